"""A run in its folder: configuration, training, resuming, comparing and verifying."""
