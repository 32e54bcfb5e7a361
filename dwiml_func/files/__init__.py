"""Files that are whole or absent, locks, fingerprints and strict JSON; nothing of torch."""
