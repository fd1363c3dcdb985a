"""Sweeps, records, curves, plots and the report; evaluation, plans, costs and advice."""
