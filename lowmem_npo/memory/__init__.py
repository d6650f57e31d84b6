"""The switches that keep a training step small."""
