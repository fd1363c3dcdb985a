"""Launchers: Cloud TPU VMs, GKE, Slurm, this machine, and the whole family on any of them."""
