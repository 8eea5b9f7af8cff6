"""LeRobotDatasets (v3): read, checked, labelled, and written."""
