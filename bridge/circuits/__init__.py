"""Circuits of prompts and of tasks: question, error nodes, masked model, loss and search, in the sparse and the dense model."""
