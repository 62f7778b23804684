"""Studies of many prompts at once: the circuits of tasks, and their comparison."""
