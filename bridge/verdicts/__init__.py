"""The tables of rules by which circuits are judged, and the couplings that must fail them."""
