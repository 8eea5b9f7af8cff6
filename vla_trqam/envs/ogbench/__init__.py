"""OGBench's tasks and the oracles that play them."""
