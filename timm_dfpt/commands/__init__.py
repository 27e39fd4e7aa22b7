"""What is done with a model that is trained: the commands `evaluate`, `predict` and `export`."""
