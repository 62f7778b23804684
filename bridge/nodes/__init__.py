"""The contexts, weights and descriptions of nodes of the sparse model, over text."""
