"""What is trained: a task supplies init, make_batch and loss."""
