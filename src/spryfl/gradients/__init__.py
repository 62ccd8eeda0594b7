"""How a client estimates the gradient of its units.

Three estimators behind one protocol: the forward gradient (forward mode), zeroth order (finite
differences) and backprop (reverse mode). Imports torch and nothing of ours but errors and
forward_mode.
"""
