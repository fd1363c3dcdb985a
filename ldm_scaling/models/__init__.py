"""Networks, the family table, and weights. The only room that imports flax."""
