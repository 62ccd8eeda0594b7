"""What a run shows: names and reasons as they stand, though they hold what rich takes for markup."""

import pytest

from spryfl.tracking.console import ConsoleObserver
from spryfl.tracking.events import RoundEvent


def test_brackets_in_names_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    event = RoundEvent(
        round=1,
        method="spry",
        loss=1.0,
        accuracy=0.5,
        test_loss=1.0,
        bytes_up=10,
        bytes_down=100,
        seconds=3.0,
        client_seconds=2.0,
        peak_activation_bytes=5,
        num_updates=2,
        failures=("3: not [/x]",),
        unheld=("unit [red]",),
        metrics={"accuracy": 0.5},
    )
    with ConsoleObserver(["spry [k=8]"], [1], hidden=False) as console:
        console.started("spry [k=8]", 0, 1)
        console.round_finished(event)
    err = capsys.readouterr().err
    assert "spry [k=8]: round 1" in err
    assert "client 3: not [/x]" in err
    assert "memory for unit [red]" in err
