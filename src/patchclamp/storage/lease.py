"""`leased`: that one process at a time works in a place of an object store.

An object store has no locks. A lease is an object that says who works there; its holder writes it again and again, and
one that has not been written for `SECONDS` is anybody's. Ages are read from the server's clock alone. A holder that
could not renew in time learns so before it writes anything that others would read.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from patchclamp.errors import StoreError
from patchclamp.storage.remote import Conflict, Remote

# After so long without a sign of life, another process may take over.
SECONDS = 60.0
_NAME = "lease.json"


class Lease:
    """A lease that is held."""

    def __init__(self, place: Remote, what: str, seconds: float) -> None:
        self.holder = uuid.uuid4().hex
        self._place, self._what, self._seconds = place, what, seconds
        self._tag: str | None = None
        self._why = ""
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="patchclamp lease", daemon=True)

    def check(self) -> None:
        """See that it is still held.

        Raises:
            StoreError: it was lost; another process may be at work.
        """
        if self._why or time.monotonic() - self._renewed > self._seconds:
            raise StoreError(
                f"the lease of {self._what} was lost ({self._why or 'it could not be renewed in time'}): another "
                "process may have gone on with the recording. The same call again goes on from the last checkpoint"
            )

    def take(self) -> None:
        """See `leased`."""
        begun = time.monotonic()
        try:
            self._tag = self._place.put(_NAME, self._content(), None)
        except Conflict:
            self._tag = self._take_over()
        self._renewed = begun
        self._thread.start()

    def give_back(self) -> None:
        """End it, also in the store."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(StoreError):
            if not self._why and self._place.tag(_NAME) == self._tag:
                self._place.delete([_NAME])

    def _take_over(self) -> str:
        tag = self._place.tag(_NAME)
        try:
            said = json.loads(self._place.read(_NAME))
            who = f"process {said['process']} on {said['host']}"
            age = self._age()
        except FileNotFoundError:  # it has just ended
            tag, age, who = None, self._seconds, "another process"
        except (ValueError, KeyError, TypeError):
            age, who = self._age(), "another process"
        taken = StoreError(
            f"{self._what} is being recorded by {who}: wait for it, or choose another store. "
            f"If that process is dead, its lease ends {self._seconds:.0f} seconds after its last sign of life"
        )
        if age < self._seconds:
            raise taken
        try:
            return self._place.put(_NAME, self._content(), tag)
        except Conflict:  # a third was faster
            raise taken from None

    def _age(self) -> float:
        """Seconds since the lease was written, both moments by the server's clock."""
        now = f"now-{self.holder}"
        self._place.delete([now])
        self._place.put(now, b"", None)
        try:
            return (self._place.modified(now) - self._place.modified(_NAME)).total_seconds()
        finally:
            self._place.delete([now])

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds / 4):
            begun = time.monotonic()
            try:
                self._tag = self._place.put(_NAME, self._content(), self._tag)
                self._renewed = begun
            except Conflict:
                self._why = "another process took it over"
                return
            except StoreError as error:
                if time.monotonic() - self._renewed > self._seconds:
                    self._why = str(error)
                    return

    def _content(self) -> bytes:
        # The moment, so that each is another object, with a tag of its own.
        said = {"holder": self.holder, "process": os.getpid(), "host": socket.gethostname(), "at": time.time()}
        return json.dumps(said).encode()


@contextmanager
def leased(place: Remote, what: str, seconds: float | None = None) -> Iterator[Lease]:
    """Hold the lease of a place while the block runs.

    Args:
        place: where its object lies.
        what: it is the lease of, for messages.
        seconds: how long it lasts without being renewed; default: `SECONDS`.

    Raises:
        StoreError: another process holds it, or it cannot be written.
    """
    lease = Lease(place, what, SECONDS if seconds is None else seconds)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()
