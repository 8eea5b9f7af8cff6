"""What cannot work, found before the first step."""
