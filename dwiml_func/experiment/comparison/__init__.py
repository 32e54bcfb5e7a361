"""Runs side by side: overviews, values by name, what differs."""
