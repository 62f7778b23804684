"""Interventions on nodes, and what they do to the dense model's answers."""
