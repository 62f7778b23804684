"""Cards: how much a task's circuit explains of the dense model."""
