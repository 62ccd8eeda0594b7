"""What travels between machines, as bytes: a JSON header and safetensors, never pickle. Imports no torch."""

import json
import socket
import struct
from dataclasses import dataclass

from spryfl.federated.failures import FailureKind


@dataclass(frozen=True)
class Parcel:
    """One message.

    Attributes:
        header: a JSON object; `kind` says what the message is.
        tensors: in safetensors' format; empty for none.
    """

    header: str
    tensors: bytes = b""


def failure_parcel(reason: str, kind: FailureKind = "raised") -> Parcel:
    """A client's report that it returns nothing usable."""
    return Parcel(json.dumps({"kind": "failure", "reason": " ".join(reason.split())[:500], "failure": kind}))


def send_parcel(connection: socket.socket, parcel: Parcel) -> None:
    """Write a parcel to a stream: two parts, each after its length."""
    for part in (parcel.header.encode(), parcel.tensors):
        connection.sendall(struct.pack(">Q", len(part)) + part)


def receive_parcel(connection: socket.socket) -> Parcel:
    """Read a parcel from a stream.

    Raises:
        ConnectionError: the other side is gone.
        TimeoutError: it took longer than the connection's timeout.
    """
    header, tensors = (_receive(connection, struct.unpack(">Q", _receive(connection, 8))[0]) for _ in range(2))
    return Parcel(header.decode(), tensors)


def _receive(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(min(count - len(received), 2**20))
        if not piece:
            raise ConnectionError("the other side closed the connection")
        received += piece
    return bytes(received)
