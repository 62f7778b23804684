"""Reading a foreign model: where its residual stream is, which model it is, what wraps it, its tokenizer."""
