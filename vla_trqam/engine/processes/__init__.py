"""The processes of a run, their randomness, memory and interruption."""
