"""Figures: every figure of the paper, from records. `catalogue.FIGURES` lists them."""
