"""Meta-World's scripted policies as demonstrators."""
