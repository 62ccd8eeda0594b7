"""The server of run.toml's run."""

from pathlib import Path

from spryfl.runtime.flower.server_app import server_app

app = server_app(Path(__file__).parent / "run.toml")
