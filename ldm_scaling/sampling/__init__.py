"""Samplers as tables of linear coefficients, and the one jitted loop that runs them."""
