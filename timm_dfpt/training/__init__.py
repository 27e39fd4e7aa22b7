"""Training: what the scripts in `train/` share."""
