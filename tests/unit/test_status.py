"""Where a run stands, told from what it has written so far."""

from collections.abc import Callable
from pathlib import Path

import pytest

from events import round_event
from spryfl.cli.main import main
from spryfl.config import RunConfig
from spryfl.tracking.run_directory import RunDirectory
from spryfl.tracking.status import run_status


def test_a_run_that_is_neither_done_nor_of_classes(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its score is the task's own, of the last round that was evaluated."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.write_config(tiny_config(server__num_rounds=9))
    for own in (
        round_event(0, clients=(0, 7), metrics={"perplexity": 90.0}),
        round_event(1, clients=(1, 7), metrics={"perplexity": 40.0}, failure_kinds={"lost": 1}),
        round_event(2, clients=(2, 7), late=("3: too late",), failure_kinds={"lost": 2, "refused": 1}),
    ):
        directory.append_event(own)
    found = run_status(directory)
    assert (found.metric, found.score, found.loss) == ("perplexity", 40.0, 2.0)
    assert (found.finished, found.rounds, found.num_rounds) == (False, 2, 9)
    assert (found.clients, found.num_late, found.failures) == ((0, 1, 2, 7), 1, {"lost": 3, "refused": 1})
    monkeypatch.setattr("sys.argv", ["spry", "status", str(directory.path)])
    with pytest.raises(SystemExit):
        main()
    assert "perplexity 40.000" in capsys.readouterr().out
