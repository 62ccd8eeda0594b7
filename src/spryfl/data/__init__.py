"""Datasets, the task made of them, and their partition among clients."""
