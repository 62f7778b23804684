"""The card: what a circuit explains of the dense model, by four tests with their ceilings, controls, intervals and nulls."""
