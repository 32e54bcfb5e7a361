"""What an HDF5 dataset holds, and what is wrong with it."""
