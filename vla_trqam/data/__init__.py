"""Transitions, replay, and readers for the datasets it is filled from."""
