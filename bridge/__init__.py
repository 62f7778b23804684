"""bridge: circuits of a weight-sparse transformer as explanations of a dense one."""
