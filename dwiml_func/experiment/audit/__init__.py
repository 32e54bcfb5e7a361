"""Proofs of what a run recorded: replays, audits, and where two runs begin to differ."""
