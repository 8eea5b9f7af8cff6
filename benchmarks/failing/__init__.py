"""A recipe that fails at a chosen place, and what is left of its run."""
