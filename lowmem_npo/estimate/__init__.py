"""How much memory a run will take, and which settings make it fit, before anything is loaded."""
