"""Studies: grids of runs, side by side, and what they say together."""
