"""Sweeps, records, curves, plots and the report."""
