"""Simulated tasks as gymnasium environments; imports nothing heavy."""
