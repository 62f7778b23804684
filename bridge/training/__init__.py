"""The start from the dense model, the losses, the loop, the refit and the evaluation."""
