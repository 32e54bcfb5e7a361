"""Tracking in a run: the phase of its validations, window lag, and the scores of its best model."""
