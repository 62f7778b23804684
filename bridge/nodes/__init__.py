"""Contexts, weights and descriptions of the sparse model's nodes on text."""
