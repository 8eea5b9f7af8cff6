"""Scripted operators of three qualities for robomimic's Lift, Can and Square."""
