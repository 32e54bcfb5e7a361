"""Models that learn tractography, and what they are compared with.

Each module is imported by its own name (`dwiml_func.models.learn2track`), so that one model does not load another.
"""
