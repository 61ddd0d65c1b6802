"""One file for each figure that this repository reproduces at the scale of a CPU, or prepares for larger machines."""
