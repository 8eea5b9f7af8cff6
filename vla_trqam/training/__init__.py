"""Training runs: evaluation statistics, metrics, progress, plots and the report."""
