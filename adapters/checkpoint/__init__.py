"""A policy as files: what may be read, how it is set right, how it is saved."""
