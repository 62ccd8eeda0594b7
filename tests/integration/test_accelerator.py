"""Rounds on a device that is not the CPU, in a process of their own: the device, once there, stays."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROUNDS = Path(__file__).parents[1] / "phantom_rounds.py"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch knows no devices made in Python",
)
def test_rounds_on_a_phantom() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
