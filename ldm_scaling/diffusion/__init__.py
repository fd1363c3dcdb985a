"""Pure maths of diffusion: schedule, parameterisation, loss."""
