"""The README's commands themselves, at a small size, and the demo end to end."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from record_readme import TABLES, read_rows

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
SMALL_RUN = {
    "server.num_rounds": 1,
    "server.cohort_size": 2,
    "partition.num_clients": 10,
    "data.max_train_examples": 80,
    "data.max_test_examples": 40,
    "runtime.num_workers": 1,  # most of the time would go into starting them
}


def spry(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spryfl", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def small(arguments: list[str]) -> list[str]:
    """The same command on less work."""
    if arguments[0] == "run" and "--resume" not in arguments:
        return arguments + [part for key, value in SMALL_RUN.items() for part in ("--set", f"{key}={value}")]
    if arguments[0] == "quantize":
        pytest.importorskip("bitsandbytes")
    if arguments[:2] == ["bench", "step"]:
        return [*arguments, "--layers", "1", "--tokens", "16", "--repeats", "1"]
    return arguments


def test_the_readme_shows_commands() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert any(command.startswith("spry run") for command in COMMANDS)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_knows_the_readmes_targets(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if command == "make demo":
        assert "spry run demo" in done.stdout


@pytest.mark.parametrize(("file", "name", "table"), TABLES)
def test_measured_tables_are_those_of_the_results(
    file: str, name: str, table: Callable[[list[dict[str, Any]]], str]
) -> None:
    block = (ROOT / file).read_text().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    assert block == table(read_rows(name))


def test_the_readmes_spry_commands_in_their_order(tmp_path: Path) -> None:
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "spry" and arguments != ["run", "demo"]:  # which the test below runs
            spry(small(arguments), tmp_path)
    assert (tmp_path / "runs").is_dir()


def test_the_demo_end_to_end(tmp_path: Path) -> None:
    done = spry([*small(["run", "demo"]), "--set", "runtime.num_workers=2", "--out", "demo", "--json"], tmp_path)
    summary = json.loads(done.stdout)
    assert summary["model"] == "builtin:minilm"
    assert summary["method"] == "fedyogi_guided"
    spry_as_published, backprop, zeroth_order = summary["compared"]
    assert (spry_as_published["method"], spry_as_published["estimator"]) == ("spry", "forward")
    assert (backprop["method"], backprop["checkpointing"]) == ("fedadam", "per_layer")
    assert (zeroth_order["method"], zeroth_order["dtype"]) == ("fedmezo", "float32")
    assert summary["accuracy_before"] == backprop["accuracy_before"]
    assert summary["peak_activation_bytes"] < backprop["peak_activation_bytes"]
    assert spry_as_published["bytes_up_per_client_round"] < backprop["bytes_up_per_client_round"]
    assert (tmp_path / "demo/comparison.png").exists()
    assert (tmp_path / "demo/adapter/adapter_model.safetensors").exists()
