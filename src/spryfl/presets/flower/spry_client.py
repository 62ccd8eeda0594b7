"""A client of run.toml's run. It imports no torch: Flower starts this anew for every message."""

from pathlib import Path

from spryfl.runtime.flower.client_app import client_app

app = client_app(Path(__file__).parent / "run.toml")
