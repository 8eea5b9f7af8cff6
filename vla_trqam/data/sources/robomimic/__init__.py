"""Robomimic's HDF5 files: read, checked and written."""
