"""HDF5 datasets: layout, reading and writing."""
