"""What runs through a circuit: edges, attention, groups, paths."""
