"""Environments to meta-train and benchmark in: domains, simulated and public, and the metrics that score them."""
