"""Pictograms composed into captioned pictures, the data set of the demo."""
