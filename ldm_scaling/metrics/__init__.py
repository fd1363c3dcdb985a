"""Moments, Frechet distance, caption agreement."""
