"""Studies of many prompts at once: tasks and their circuits, compared."""
