"""A lock in object storage: an object that its holder renews, and others take over if he does not.

Knows conditional writes; compares no clocks of different machines. Does not know what is locked.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from cluster.s3 import Place
from cluster.s3_requests import NotAsExpected
from memedit.errors import InputError, LockError, MemeditError

LEASE_S = 30.0
"""Who has not renewed it for so long counts as dead; `MEMEDIT_LEASE_S`."""


class Lease:
    """Hold the lock object `name` of a place while the block runs.

    Entering takes a moment where nobody holds it, and up to `LEASE_S` where somebody seems to: it
    waits for a sign of life (then it is a `LockError`) or, if there is none, takes the lock over.

    Raises:
        LockError: Another run holds it.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._lease_s = _lease_s()
        # One request on a dead connection must not keep this run silent until others take over.
        self.place = replace(place, storage=place.storage.of_notes, timeout_s=self._lease_s / 3)
        self.name = name
        self.taken_over = False
        """Whether the holder before has died without letting go."""
        self._owner = secrets.token_hex(8)
        self._etag = ""
        self._lost: Exception | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        while not self._take():
            pass
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def _take(self) -> bool:
        try:
            self._etag = self.place.put(self.name, self._content(), absent=True)
            return True
        except NotAsExpected:
            found = self.place.get(self.name)
        if found is None:
            return False  # let go of just now: try again
        # Counted in looks: a moment in which this process itself stood still proves nothing.
        looks = max(10, math.ceil(self._lease_s))
        for _ in range(looks):
            time.sleep(self._lease_s / looks)
            now = self.place.get(self.name)
            if now is None:
                return False
            if now[1] != found[1]:
                raise self._held(now[0])
        try:
            self._etag = self.place.put(self.name, self._content(), etag=found[1])
        except NotAsExpected as error:
            raise self._held(found[0]) from error
        self.taken_over = True
        return True

    def abandon(self) -> None:
        """Renew the lock no longer, but let it lie until it runs out."""
        self._lost = LockError(f"{self.place.at(self.name)}: was left behind")

    def check(self) -> None:
        """Make sure, just before something is made visible, that the lock is still held.

        Raises:
            LockError: It was taken over, because this process could not renew it in time.
        """
        if self._lost is None:
            self._look()
        self.check_known()

    def check_known(self) -> None:
        """As `check`, but by what is known already; no request is made.

        Raises:
            LockError: As `check`.
        """
        if self._lost is not None:
            raise self._lost

    def _look(self) -> None:
        found = self.place.get(self.name)
        if found is None or self._owner not in found[0].decode(errors="replace"):
            self._lost = LockError(
                f"{self.place.at(self.name)}: another run has taken over, because this one"
                f" could not renew its lock for {self._lease_s:g} s"
            )
        else:
            self._etag = found[1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(MemeditError):  # not ours any more, or out of reach: it runs out by itself
            self.check()
            try:
                self.place.delete([self.name], etag=self._etag)
            except NotAsExpected:
                raise  # taken over at this very moment
            except MemeditError:  # a storage that knows no such condition may refuse it
                self.place.delete([self.name])

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            try:
                try:
                    self._etag = self.place.put(self.name, self._content(), etag=self._etag)
                except NotAsExpected:
                    self._look()  # an earlier try that seemed to fail may have been granted
            except Exception:
                continue  # out of reach; whoever takes over meanwhile is seen with the next try
            if self._lost is not None:
                return

    def _content(self) -> bytes:
        holder = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "renewed_at": datetime.now(UTC).isoformat(),
        }
        return json.dumps(holder).encode()

    def _held(self, content: bytes) -> LockError:
        holder: Any = {}
        try:
            holder = json.loads(content)
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another run"
        return LockError(f"{self.place.at(self.name)}: {who} holds this lock; wait until it ends")


def _lease_s() -> float:
    text = os.environ.get("MEMEDIT_LEASE_S") or str(LEASE_S)
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise InputError(f"{text!r} is not a number of seconds", field="MEMEDIT_LEASE_S")
