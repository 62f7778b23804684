"""Tables of rules that judge circuits, and null couplings that must fail them."""
