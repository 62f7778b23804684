"""Interventions on nodes, and their effects on the dense model's answers."""
