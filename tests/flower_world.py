"""A SuperLink and SuperNodes as processes on loopback, with or without certificates; all are stopped at the end."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from spryfl.tracking.events import RoundEvent
from spryfl.tracking.run_directory import RunDirectory

BIN = Path(sys.executable).parent


class FlowerWorld:
    """One SuperLink, its nodes and an app.

    Args:
        table: of run.toml.
        secure: with certificates and node authentication.
        simulation: the SuperLink has clients of its own, in Ray's processes, instead of nodes.
        extra: lines at the end of the client app's module, which make clients misbehave.
    """

    def __init__(
        self,
        folder: Path,
        table: Mapping[str, Any],
        *,
        secure: bool = False,
        simulation: bool = False,
        extra: str = "",
    ) -> None:
        self.folder, self.secure, self.simulation = folder, secure, simulation
        self.port = _free_port()
        self.run_dir = folder / "run"
        self.temporary = tempfile.mkdtemp(prefix="fw", dir="/tmp")  # sockets' paths must be short
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": self.temporary,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "HF_HUB_OFFLINE": "1",
            "RAY_worker_niceness": "0",  # or whatever else runs on this machine goes before a simulation's clients
            "OMP_NUM_THREADS": "1",
        }
        (folder / "flwr").mkdir(parents=True)
        if secure:
            self._make_certificates()
        trust = {"root-certificates": str(folder / "ca.crt")} if secure else {"insecure": True}
        connection = {"address": f"127.0.0.1:{self.port}", **trust}
        (folder / "flwr/config.toml").write_text(tomli_w.dumps({"superlink": {"default": "test", "test": connection}}))
        self.app = folder / "app"
        self.spry("init", "--flower", str(self.app))
        (self.app / "run.toml").write_text(tomli_w.dumps(table))
        with (self.app / "spry_client.py").open("a") as module:
            module.write(extra)

    def __enter__(self) -> "FlowerWorld":
        self.superlink = self.start_superlink()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            kill(process)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def start_superlink(self) -> "subprocess.Popen[bytes]":
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--database", str(self.folder / "superlink.db")]
        if self.secure:
            names = {"certfile": "server.crt", "keyfile": "server.key", "ca-certfile": "ca.crt"}
            trust = [part for n, f in names.items() for part in (f"--ssl-{n}", str(self.folder / f))]
            trust += ["--enable-supernode-auth"]
        else:
            trust = ["--insecure"]
        trust += ["--simulation"] if self.simulation else []
        process = self._start("flower-superlink", *where, *trust)
        wait_for(lambda: _accepts(self.port), 60, "the SuperLink listens")
        return process

    def start_node(
        self,
        partition: int,
        key: str | None = None,
        extra: str = "",
        cwd: Path | None = None,
        superlink: int | None = None,
    ) -> "subprocess.Popen[bytes]":
        """A SuperNode.

        Args:
            key: name of its private key; None for none.
            extra: more of its node config.
            cwd: where it starts, and relative paths begin.
            superlink: another port to reach the SuperLink by.
        """
        trust = ["--root-certificates", str(self.folder / "ca.crt")] if self.secure else ["--insecure"]
        trust += ["--auth-supernode-private-key", str(self.folder / key)] if key else []
        where = ["--superlink", f"127.0.0.1:{superlink or self.port}", "--port", str(_free_port())]
        config = ["--node-config", f"partition-id={partition} {extra}".strip()]
        return self._start("flower-supernode", *trust, *where, *config, cwd=cwd)

    def make_key(self, name: str, *, register: bool = True) -> str:
        key, public = self.folder / name, self.folder / f"{name}.pub"
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", str(key)]
        if shutil.which("ssh-keygen"):
            subprocess.run(command, check=True)
        else:
            _write_key(key, public)
        if register:
            self.flwr("supernode", "register", str(public), "test")
        return name

    def submit(self, *options: str, **run_config: object) -> int:
        """Start the run; returns its id.

        Args:
            options: more of `flwr run`.
        """
        values = {"run-dir": str(self.run_dir)} | {k.replace("_", "-"): v for k, v in run_config.items()}
        given = " ".join(f"{k}='{v}'" if isinstance(v, str) else f"{k}={v}" for k, v in values.items())
        printed = self.flwr("run", str(self.app), "test", "--run-config", given, *options, "--format", "json")
        return int(json.loads(printed)["run-id"])

    def status(self, run_id: int) -> str:
        """pending, running or finished:completed and so on."""
        rows = json.loads(self.flwr("list", "test", "--run-id", str(run_id), "--format", "json"))["runs"]
        return str(rows[0]["status"])

    def finish(self, run_id: int, seconds: float) -> str:
        """Wait until a run has ended; Flower's command is asked seldom, as it takes seconds of processor time."""
        end = time.monotonic() + seconds
        while not (status := self.status(run_id)).startswith("finished"):
            assert time.monotonic() < end, f"run {run_id} is {status} after {seconds} s\n{self.log()}"
            asked = time.monotonic()
            while time.monotonic() < min(end, asked + 20) and not (self.run_dir / "summary.json").exists():
                time.sleep(0.2)
        return status

    def wait_for_round(self, number: int, seconds: float) -> None:
        wait_for(lambda: any(e.round >= number for e in self.events()), seconds, f"round {number} is done")

    def events(self) -> list[RoundEvent]:
        return RunDirectory(self.run_dir).read_events()

    def flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            [BIN / "flwr", *arguments], env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def spry(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "spryfl", *arguments]
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def log(self) -> str:
        """What the processes wrote, and what the server app told the SuperLink."""
        with sqlite3.connect(self.folder / "superlink.db") as database:
            own = [str(row) for row in database.execute("select * from task_logs")]
        return "\n".join([*(p.read_text(errors="replace")[-5000:] for p in sorted(self.folder.glob("*.log"))), *own])

    def _start(self, program: str, *arguments: str, cwd: Path | None = None) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{len(self.processes)}-{program}.log").open("wb") as log:
            process = subprocess.Popen(
                [BIN / program, *arguments],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=cwd or self.folder,
            )
        self.processes.append(process)
        return process

    def _make_certificates(self) -> None:
        """A certificate authority of our own, and the SuperLink's certificate for loopback."""
        ca, server = self.folder / "ca", self.folder / "server"
        names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
        for command in (
            ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test CA"]
            + ["-keyout", f"{ca}.key", "-out", f"{ca}.crt"],
            ["req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", names]
            + ["-keyout", f"{server}.key", "-out", f"{server}.csr"],
            ["x509", "-req", "-in", f"{server}.csr", "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial"]
            + ["-days", "1", "-copy_extensions", "copy", "-out", f"{server}.crt"],
        ):
            subprocess.run(["openssl", *command], check=True, capture_output=True)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those it started, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s until {what}"
        time.sleep(0.2)


def processes_of(folder: Path, program: str) -> list[int]:
    """Processes of a program that were started in a folder (Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if program.encode() in command and (process / "cwd").resolve().is_relative_to(folder):
                found.append(int(process.name))
    return found


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_key(key: Path, public: Path) -> None:
    """An elliptic-curve key pair as ssh-keygen writes it."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(ec.SECP384R1())
    key.write_bytes(made.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
    public.write_bytes(made.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH))
