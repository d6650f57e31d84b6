"""A GPU that has no memory but counts it, and a model on it, for an estimate to run a training step on."""
