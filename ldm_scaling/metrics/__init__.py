"""Distances between sets of pictures, scores of single pictures, and how sure each one is."""
