"""Changes made by a fine-tune: compare the base's coupling node by node with the adapted one; test the changes in the base."""
