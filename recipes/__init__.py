"""Runnable scripts and their settings."""
