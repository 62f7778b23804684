"""The explanation of a prompt: built, as a value, as text, page and files for other viewers."""
