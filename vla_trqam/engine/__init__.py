"""The run: phases of updates, rollouts, evaluations and what is kept of them."""
