"""A LeRobot policy's two fields: where the base's weights are, and how both are evaluated."""
