"""The residual model, dense and sparse; the bridges between them; saving and loading."""
