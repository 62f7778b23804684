"""Initialisation from the dense model, objective, training loop, refit of the decoders and evaluation."""
