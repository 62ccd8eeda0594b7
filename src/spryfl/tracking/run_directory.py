"""A run's directory: what is written, atomically, and what a resumed run reads back.

config.toml             the whole configuration
events.jsonl            one round a line
checkpoint.safetensors  the state after the last round
estimator-choice.json   what the choice of clients' estimators rests on, where they are chosen
adapter/                the trained adapter and head, in PEFT's format
samples.jsonl           what the trained model answers to some test rows, where the task has answers to read
summary.json            once the run is done
failure.txt             why a suite's run ended without one, until it is tried again
progress.png            the main metric and the loss over rounds; comparison.png: of several runs
partition.png           which labels each client holds, and how many rows
compare/NAME/           the same, for each compared run
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from spryfl.config import RunConfig, load_config
from spryfl.errors import ConfigError, RunDirectoryError
from spryfl.federated.choosing import Calibration
from spryfl.federated.state import FederatedState
from spryfl.files import write_atomically
from spryfl.tracking.events import RoundEvent, Summary
from spryfl.tracking.lock import LOCK_FILE

STATE_PARTS = tuple(part.name for part in fields(FederatedState) if part.name not in ("round", "overdue"))


@dataclass(frozen=True)
class RunDirectory:
    """Paths in a run's directory, and the reading and writing of each."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def choice_file(self) -> Path:
        return self.path / "estimator-choice.json"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def failure_file(self) -> Path:
        return self.path / "failure.txt"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def compared(self, name: str) -> "RunDirectory":
        return RunDirectory(self.path / "compare" / name)

    def write_config(self, config: RunConfig) -> None:
        table = config.model_dump(exclude_none=True, mode="json")
        write_atomically(self.config_file, tomli_w.dumps(table).encode())

    def read_config(self) -> RunConfig:
        if not self.config_file.is_file():
            raise RunDirectoryError(f"{self.path}: no run to resume here: it has no config.toml")
        try:
            return load_config(self.config_file)
        except ConfigError as error:
            raise RunDirectoryError(f"{self.config_file}: {error}") from error

    def append_event(self, event: RoundEvent) -> None:
        """Add a line and force it to disk, so that no checkpoint is ahead of its events."""
        with self.events_file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event.as_row()) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def read_events(self) -> list[RoundEvent]:
        if not self.events_file.is_file():
            return []
        events = []
        for line in self.events_file.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the last line of a killed run may be torn; its round is repeated
            with _readable(self.events_file):
                events.append(RoundEvent.from_row(json.loads(line)))
        return events

    def keep_events(self, last_round: int) -> list[RoundEvent]:
        """Drop what a killed run wrote after its last checkpoint; returns what is kept."""
        kept = [event for event in self.read_events() if event.round <= last_round]
        lines = "".join(json.dumps(event.as_row()) + "\n" for event in kept)
        write_atomically(self.events_file, lines.encode())
        return kept

    def write_checkpoint(self, state: FederatedState) -> None:
        tensors = {
            f"{part}/{name}": tensor.contiguous()
            for part in STATE_PARTS
            for name, tensor in getattr(state, part).items()
        }
        # One entry: safetensors writes several in any order, and equal states are to be equal files.
        about = json.dumps({"round": state.round, "overdue": state.overdue})
        write_atomically(self.checkpoint_file, save(tensors, metadata={"state": about}))

    def read_checkpoint(self) -> FederatedState | None:
        """The state after the last finished round; None if there is none yet."""
        if not self.checkpoint_file.is_file():
            return None
        try:
            with safe_open(str(self.checkpoint_file), framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                about = json.loads(handle.metadata()["state"])
                round, overdue = int(about["round"]), tuple(about["overdue"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(f"{self.checkpoint_file}: not a checkpoint of ours, or damaged: {error}") from error
        parts: dict[str, dict[str, Any]] = {part: {} for part in STATE_PARTS}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        return FederatedState(round, overdue=overdue, **parts)

    def write_calibration(self, calibration: Calibration) -> None:
        write_atomically(self.choice_file, (json.dumps(asdict(calibration), indent=2) + "\n").encode())

    def read_calibration(self) -> Calibration | None:
        """What was measured when the run began; None if it was not yet."""
        if not self.choice_file.is_file():
            return None
        try:
            row = json.loads(self.choice_file.read_text(encoding="utf-8"))
            return Calibration(row["speeds"], {int(place): cosine for place, cosine in row["cosines"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunDirectoryError(f"{self.choice_file}: not of ours, or damaged: {error}") from error

    def write_samples(self, samples: Sequence[Mapping[str, str]]) -> None:
        """One a line; no file where there are none."""
        if samples:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            write_atomically(self.path / "samples.jsonl", lines.encode())

    def write_summary(self, summary: Summary) -> None:
        write_atomically(self.summary_file, (json.dumps(summary.as_row(), indent=2) + "\n").encode())

    def read_summary(self) -> Summary | None:
        if not self.summary_file.is_file():
            return None
        with _readable(self.summary_file):
            return Summary.from_row(json.loads(self.summary_file.read_text(encoding="utf-8")))

    def write_failure(self, reason: str, trace: str = "") -> None:
        """A line, and below it where in the code it was raised, if that is of use."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.failure_file, f"{' '.join(reason.split())}\n{trace}".encode())

    def read_failure(self) -> str | None:
        """Why the run's last attempt ended; None if it did not fail."""
        return self.failure_file.read_text(encoding="utf-8").split("\n")[0] if self.failure_file.is_file() else None

    def clear(self) -> None:
        """Remove what a run writes before its first event, and the folder unless it holds something else."""
        for file in (
            self.config_file,
            self.events_file,
            self.choice_file,
            self.path / "partition.png",
            self.path / LOCK_FILE,
        ):
            file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def write_adapter(self, save_to: Callable[[Path], None]) -> None:
        """Have a folder written under another name, then put it in place."""
        fresh = self.path / "adapter.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            save_to(fresh)
            shutil.rmtree(self.adapter, ignore_errors=True)
            fresh.rename(self.adapter)
        except OSError:
            raise
        except Exception as error:  # safetensors and tokenizers have kinds of their own for what the system says
            raise RunDirectoryError(f"{self.adapter} cannot be written: {error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def create_run_directory(path: Path) -> RunDirectory:
    """Make a new run's directory; refuses one that already holds a run."""
    directory = RunDirectory(path)
    written = (directory.config_file, directory.events_file, directory.checkpoint_file, directory.summary_file)
    if any(file.exists() for file in written):
        raise RunDirectoryError(
            f"{path} already holds a run. Go on with it: spry run --resume {path}; or choose another --out"
        )
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file: choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What cannot be understood inside is said of the file."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise RunDirectoryError(
            f"{file}: of another version of spry, or damaged ({error}): use that version, or remove the folder"
        ) from error
