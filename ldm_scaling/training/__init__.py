"""Train state, train step, optimiser, checkpoints, the one loop."""
