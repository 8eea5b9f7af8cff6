"""Sources of episodes: one room a format."""
