"""Reading a foreign model: its residual stream, its identity, its wrappers and adapters, its tokenizer."""
