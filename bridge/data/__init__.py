"""Text to tokens; tasks as data."""
