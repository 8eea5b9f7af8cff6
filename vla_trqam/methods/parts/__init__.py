"""What the methods are made of: the shared updates, an edit, processes, checks and results."""
