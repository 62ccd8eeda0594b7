"""Which node holds which partition: asked once of every node, and again of one that was started anew."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from spryfl.runtime.flower.wire import parcel_of, to_content
from spryfl.runtime.parcels import Parcel

ASKING_SECONDS = 600.0


@dataclass(frozen=True)
class Session:
    """A node from one start to its next.

    Attributes:
        since: when the SuperLink saw it start; a registered node keeps its id when it is started again.
    """

    node: int
    since: str


class Presence:
    """The clients that are connected, by partition id.

    Args:
        base: hash of the base model of this run; clients that hold another are refused.
        num_clients: of the run; a node that is none of them takes no part.
        told: is told of what a person should know.
    """

    def __init__(self, grid: Grid, base: str, num_clients: int, told: Callable[[str], None] = print) -> None:
        self._grid = grid
        self._base = base
        self._num_clients = num_clients
        self._told = told
        self._asked: dict[str, Session] = {}
        self._known: set[Session] = set()
        self._online: set[Session] = set()
        self._sessions: dict[int, Session] = {}
        self._turned_away: dict[Session, int] = {}
        self.refused: dict[int, str] = {}
        """Partition id -> why its node takes no part."""

    def look(self) -> None:
        """See who is online, ask newcomers who they are, and note what those asked before have answered."""
        self._online = {Session(node.node_id, node.last_activated_at or "") for node in self._grid.get_nodes()}
        for session, client in list(self._turned_away.items()):
            if self.session(client) is None:  # whom it was turned away for is gone: it may speak again
                del self._turned_away[session]
                self._known.discard(session)
        newcomers = sorted(self._online - self._known, key=lambda session: session.node)
        if newcomers:
            question = to_content(Parcel(json.dumps({"kind": "presence"})))
            messages = [Message(question, s.node, MessageType.QUERY, ttl=ASKING_SECONDS) for s in newcomers]
            self._asked |= dict(zip(self._grid.push_messages(messages), newcomers, strict=True))
            self._known |= set(newcomers)
        if self._asked:
            for reply in self._grid.pull_messages(list(self._asked)):
                self._note(self._asked.pop(reply.metadata.reply_to_message_id), reply)

    def session(self, client: int) -> Session | None:
        """Where a client is; None if it is not connected."""
        found = self._sessions.get(client)
        return found if found in self._online else None

    @property
    def clients(self) -> list[int]:
        return sorted(client for client in self._sessions if self.session(client) is not None)

    def _note(self, session: Session, reply: Message) -> None:
        if reply.has_error():
            self._known.discard(session)  # it is asked again, if it is still there
            return
        client, base, problem = _read(parcel_of(reply), self._num_clients)
        if client is None:
            self._told(f"node {session.node} takes no part: {problem}")
        elif base != self._base:
            problem = f"it holds another base model ({base[:12]}) than this run's ({self._base[:12]})"
            if self.session(client) not in (None, session):  # one misconfigured node is not to put out an honest one
                self._turned_away[session] = client
                self._told(f"node {session.node} is refused as client {client}, which another node is: {problem}")
                return
            self.refused[client] = problem
            self._sessions.pop(client, None)
            self._told(f"client {client} is refused: {problem}")
        else:
            self.refused.pop(client, None)
            self._sessions[client] = session
            self._told(f"client {client} is here")


def _read(parcel: Parcel, num_clients: int) -> tuple[int | None, str, str]:
    """Partition id, base model and, where there is no partition id, what is wrong."""
    try:
        row = json.loads(parcel.header)
        if row["kind"] == "failure":
            return None, "", str(row["reason"])[:500]
        client, base = row["client"], row["base"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, "", "its answer to who it is cannot be read"
    if type(client) is not int or not isinstance(base, str):
        return None, "", "its answer to who it is makes no sense"
    if not 0 <= client < num_clients:
        return None, "", f"its partition-id is {client}, but clients are 0 to {num_clients - 1}"[:500]
    return client, base, ""
