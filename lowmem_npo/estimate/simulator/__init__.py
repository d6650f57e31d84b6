"""A GPU that has no memory but counts it, and a model on it: what an estimate runs a training step on."""
