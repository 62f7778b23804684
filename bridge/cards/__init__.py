"""Cards: evidence on how far a task's circuit explains the dense model."""
