"""One file a family of host policies: how it is seen as a velocity field."""
