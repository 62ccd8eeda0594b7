"""Base models, their adapters, and the trainable units the server assigns."""
