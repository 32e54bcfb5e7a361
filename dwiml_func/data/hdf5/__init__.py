"""HDF5 datasets: layout and its problems, reading (in memory or lazily), writing."""
