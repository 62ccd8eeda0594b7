"""A run's configuration from an app's folder, Flower's run config and a node's config."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spryfl.config import RunConfig, load_config
from spryfl.errors import ConfigError, nearest

RUN_KEYS = {"run-dir": "", "set": "", "wait-seconds": 300.0}
"""Keys of [tool.flwr.app.config]: where the server keeps the run; part.key=value pairs over run.toml; how long the
server waits at the start for all clients to come."""


@dataclass(frozen=True)
class Order:
    """What is to be run.

    Attributes:
        file, overrides: where the configuration came from, so that another process can read it again.
        run_dir: on the server's machine.
    """

    file: Path
    overrides: tuple[str, ...]
    config: RunConfig
    run_dir: Path
    wait_seconds: float

    @property
    def num_clients(self) -> int | None:
        """As the configuration states it; None where a column of the data decides."""
        return None if self.config.partition.kind == "column" else self.config.partition.num_clients


def read_order(file: Path, run_config: Mapping[str, Any]) -> Order:
    """Read a run's file and apply Flower's run config.

    Raises:
        ConfigError: an unknown key, an impossible value, or more than one run in the file.
    """
    for key in run_config:
        if key not in RUN_KEYS:
            raise ConfigError(
                f"run config '{key}': unknown.{nearest(key, RUN_KEYS)} Known: {', '.join(RUN_KEYS)}; a run's own keys "
                f"are set so: set='server.num_rounds=5'"
            )
    values: dict[str, Any] = RUN_KEYS | dict(run_config)
    try:
        overrides = tuple(shlex.split(str(values["set"])))
    except ValueError as error:
        raise ConfigError(f"run config set={values['set']!r}: {error}: close what is quoted") from error
    try:
        wait_seconds = float(values["wait-seconds"])
    except ValueError as error:
        raise ConfigError(f"run config wait-seconds={values['wait-seconds']!r}: give a number of seconds") from error
    config = load_config(file, overrides)
    if config.compare:
        raise ConfigError(f"{file}: compare: over Flower every run stands alone; leave it out")
    run_dir = str(values["run-dir"]) or f"runs/{file.stem}-flower"
    return Order(file, overrides, config, Path(run_dir).expanduser(), wait_seconds)


def partition_of(node_config: Mapping[str, Any], num_clients: int | None) -> int:
    """The partition id a node's configuration states.

    Args:
        num_clients: None where only the data tell.

    Raises:
        ConfigError: none, or one that is no client's.
    """
    given = node_config.get("partition-id")
    if type(given) is not int or given < 0 or (num_clients is not None and given >= num_clients):
        known = "0 and up" if num_clients is None else f"0 to {num_clients - 1}"
        raise ConfigError(
            f"node config: partition-id is {given!r}, but clients are {known}: start the node with "
            "--node-config 'partition-id=0'"
        )
    return given


def own_data_of(node_config: Mapping[str, Any], kind: str) -> str | None:
    """The path of a node's own data; None where it takes its part of the run's.

    Raises:
        ConfigError: what its configuration names does not go with the run's partition.
    """
    given = node_config.get("data")
    if (given is None) == (kind == "own"):
        wrong = "names no data" if given is None else "names data of its own"  # where it lies is nobody's business
        raise ConfigError(
            f"node config: it {wrong}, but partition.kind = '{kind}': data = 'PATH' and partition.kind = 'own' go "
            "together"
        )
    return None if given is None else str(given)
