"""Memory, measured and predicted."""
