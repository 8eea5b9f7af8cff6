"""Robomimic's tasks: environments, their settings, demonstrations, plugins for LeRobot."""
