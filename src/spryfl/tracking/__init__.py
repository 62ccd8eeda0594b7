"""Events of a run and those who listen: the console, the run directory, TensorBoard."""
