"""Figures of runs, models and datasets."""
