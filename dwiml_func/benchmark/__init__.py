"""A tractography benchmark that needs nothing but the package: one person of the example data is left out at a time."""
