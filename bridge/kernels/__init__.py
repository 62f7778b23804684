"""What is computed in a training step's inner loops, on every device: one name each."""
