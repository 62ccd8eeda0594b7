"""Memory, measured. Predicting it before a run comes later."""
