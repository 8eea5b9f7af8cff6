"""What the authors' recorded updates hold, and how ours replay them."""
