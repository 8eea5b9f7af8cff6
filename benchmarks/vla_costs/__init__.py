"""What an update of a full-size VLA takes: models, steps, meter."""
