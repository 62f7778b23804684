"""The explanation of a prompt: its construction, its value, and its text, page and files for other viewers."""
