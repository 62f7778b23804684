"""Changes that a fine-tune made: a coupling of the base beside the one that went on from it, node by node, checked there."""
