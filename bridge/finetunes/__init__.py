"""What a fine-tune changed: a coupling of the base beside the one that went on from it, node by node, checked in the base."""
