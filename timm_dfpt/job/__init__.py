"""What any job is: options and recipes, optimizers, devices, how it is stopped, and the lock on its folder."""
