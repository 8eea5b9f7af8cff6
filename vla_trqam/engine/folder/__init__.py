"""A run's folder: checkpoints, settings, locks and what a resumed run finds there."""
