"""Measures of a circuit in the sparse and in the dense model, compared with controls that could win, and the verdict."""
