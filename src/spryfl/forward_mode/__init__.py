"""What makes one forward-mode pass fit in inference memory. Imports torch and transformers only."""
