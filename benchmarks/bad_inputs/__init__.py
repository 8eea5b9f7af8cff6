"""The table of bad input, area by area: what is asked and how it must be refused."""
