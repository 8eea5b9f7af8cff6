"""Run folders as a reader's pages and pictures take them."""
