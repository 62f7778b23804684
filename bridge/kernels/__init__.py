"""The inner loops of a training step; each has one name on every device."""
