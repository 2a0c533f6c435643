"""Scenarios with one failure each, for the level of I/O errors."""
