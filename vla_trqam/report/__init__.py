"""What a run tells: statistics, metrics, figures, pages."""
