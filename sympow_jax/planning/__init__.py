"""Compiles a run's programs for hardware that is not there, and reads memory, work and traffic off the result."""
