"""`lowmem-npo sweep`: a grid of settings times seeds, on one loaded model, as mean and standard deviation."""
