"""What a run shows: names and reasons as they stand, though they hold what rich takes for markup."""

import pytest

from events import round_event
from spryfl.tracking.console import ConsoleObserver
from spryfl.tracking.events import Note


def test_a_note_of_several_runs_data_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleObserver(["a", "b"], [1, 1], hidden=False) as console:
        for label in ("a", "b"):
            console.started(label, 0, 1)
            console.noted(Note("truncated", "reviews", "3 of 9 train texts are longer [than that]"))
            console.noted(Note("missing_classes", "reviews", "2 clients"))
    err = capsys.readouterr().err
    assert err.count("reviews: 3 of 9 train texts are longer [than that]") == err.count("reviews: 2 clients") == 1


def test_brackets_in_names_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    event = round_event(1, accuracy=0.5, metrics={"accuracy": 0.5}, failures=("3: not [/x]",), unheld=("unit [red]",))
    with ConsoleObserver(["spry [k=8]"], [1], hidden=False) as console:
        console.started("spry [k=8]", 0, 1)
        console.round_finished(event)
    err = capsys.readouterr().err
    assert "spry [k=8]: round 1" in err
    assert "client 3: not [/x]" in err
    assert "memory for unit [red]" in err
