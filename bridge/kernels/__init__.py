"""The inner loops of a training step, on every device: one name each."""
