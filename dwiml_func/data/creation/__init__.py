"""HDF5 datasets made of NIfTI files and tractograms."""
