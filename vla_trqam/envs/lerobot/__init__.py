"""LeRobot's simulators: what its factory makes, as families."""
