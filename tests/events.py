"""Events of rounds that nobody ran."""

from typing import Any

from spryfl.tracking.events import RoundEvent


def round_event(round: int, **more: Any) -> RoundEvent:
    """One of two clients that was not evaluated, but for what is said."""
    values: dict[str, Any] = {
        "method": "spry",
        "loss": 2.0,
        "accuracy": None,
        "test_loss": None,
        "bytes_up": 10,
        "bytes_down": 100,
        "seconds": 3.0,
        "client_seconds": 2.0,
        "peak_activation_bytes": 5,
        "num_updates": 2,
    }
    return RoundEvent(round=round, **values | more)
