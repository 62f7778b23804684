"""Tasks as data: pairs of text, and their tokens under any tokenizer."""
