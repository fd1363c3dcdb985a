"""Distillation: losses of students that need few steps, as functions of any two networks.

Each maker gives `loss(params, batch, key, beside) -> (scalar, metrics)`, as `training.task.Task`
takes it: `beside.frozen` are the teacher's parameters, `beside.average` the student's averaged
ones. Neither has a gradient. Student and teacher are `denoise` functions that predict the same;
`diffusion.reparameterized` makes them so.
"""
