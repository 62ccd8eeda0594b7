"""How a client estimates the gradient of its units.

Estimators behind one protocol: forward gradients along random directions, at the bottleneck, and along guesses;
zeroth order (finite differences); backprop (reverse mode). Imports torch and nothing of ours but errors and
forward_mode.
"""
