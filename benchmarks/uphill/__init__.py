"""Whether a critic's gradient leads uphill: what is measured and how it is told."""
