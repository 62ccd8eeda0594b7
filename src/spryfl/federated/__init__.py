"""The federated algorithm: state in, state out, no input or output.

`method.py` names the methods as combinations of four parts: estimator x assignment x what travels up x
server optimizer. `rounds.py` reads top to bottom like the paper's algorithm.
"""
