"""Structure of a circuit: edges, attention, groups, paths."""
