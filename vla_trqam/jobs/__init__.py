"""One file a kind of run: what it brings to the engine."""
