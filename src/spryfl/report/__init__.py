"""Results people would rather look at: plots and tables."""
