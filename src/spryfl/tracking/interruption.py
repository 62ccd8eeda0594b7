"""Ctrl-C and SIGTERM stop a run before its next client; the last finished round is saved already."""

import signal

from spryfl.tracking.events import Observer

EXIT_CODE = 130
"""Of a command that a signal stopped, as shells have it."""


class Interruption(Observer):
    """Notes the first signal and raises KeyboardInterrupt at the next safe place; a second one raises at once.

    Raising in the handler itself would not do: Python swallows an exception that falls into a finalizer.
    """

    def __init__(self) -> None:
        self._wanted = False
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: object) -> None:
        if self._wanted:
            raise KeyboardInterrupt
        self._wanted = True

    def before_client(self) -> None:
        """See `Observer.before_client`."""
        if self._wanted:
            raise KeyboardInterrupt
