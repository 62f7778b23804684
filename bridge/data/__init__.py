"""Text to tokens, and tasks as data."""
