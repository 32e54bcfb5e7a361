"""The built-in example data: simulated signal along real bundles."""
