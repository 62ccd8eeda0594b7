"""The ways in which a task can end without an update."""

from typing import Literal

FailureKind = Literal["raised", "deadline", "absent", "lost", "refused"]
"""raised: the client reported an error; deadline: it took too long; absent: it is not connected; lost: no answer came;
refused: what it sent failed validation, or it holds another base model."""
