"""The residual model, dense and sparse; the bridges between the two; saving and loading."""
