"""Measures of a circuit, in the sparse and in the dense model, beside controls that could win; and the verdict."""
