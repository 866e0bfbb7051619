"""A store in memory that lets a test decide who comes next.

Every call of the store is one step. `steps_of` counts them, `interleave` runs commands step by step
in an order that is given; what happens is then the same each time.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cluster.store import ABSENT, Store
from memedit.errors import InputError, LockError
from memedit.files import Files

_WRITES = itertools.count()
"""Of all stores: objects may be handed from one to another."""


@dataclass(eq=False)
class MemoryStore(Store):
    """Objects in a dictionary; `before` is called with the operation and the name at each step."""

    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    before: Callable[[str, str], None] = lambda operation, name: None
    begun: set[str] = field(default_factory=set)
    """Uploads that did not end."""
    exclusive: bool = True
    """Whether the lock keeps anybody out; one that ran out does not."""
    locked: bool = False
    place: str = "memory"

    @property
    def location(self) -> str:
        return self.place

    def get(self, name: str) -> tuple[bytes, str] | None:
        self.before("get", name)
        return self.objects.get(name)

    def put(self, name: str, content: bytes, *, expected: str) -> str:
        self.before("put", name)
        if self.objects.get(name, (b"", ABSENT))[1] != expected:
            raise LockError(f"{name}: was changed by another run meanwhile")
        token = f"v{next(_WRITES)}"
        self.objects[name] = (content, token)
        return token

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        self.before("sizes", folder)
        prefix = f"{folder}/" if folder else ""
        return {
            name: len(content)
            for name, (content, _) in sorted(self.objects.items())
            if name.startswith(prefix) and (deep or "/" not in name[len(prefix) :])
        }

    def folders(self, folder: str = "") -> list[str]:
        self.before("folders", folder)
        prefix = f"{folder}/" if folder else ""
        inside = (n[len(prefix) :] for n in self.objects if n.startswith(prefix))
        return sorted({name.split("/")[0] for name in inside if "/" in name})

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.before("delete", name)
            self.objects.pop(name, None)

    def files(self, folder: str = "") -> Files:
        return _MemoryFiles(self, f"{folder}/" if folder else "")

    @contextmanager
    def lock(self) -> Iterator[None]:
        self.before("lock", "")
        if self.locked and self.exclusive:
            raise LockError("another run holds this lock")
        self.locked = True
        try:
            yield
        finally:
            self.locked = False

    def uploads(self, folder: str = "") -> list[str]:
        return sorted(name for name in self.begun if name.startswith(folder))

    def abort_uploads(self, folder: str = "") -> None:
        self.begun -= set(self.uploads(folder))

    def write(self, name: str, content: bytes = b"x") -> None:
        """Put an object there, whatever was there; no step."""
        self.objects[name] = (content, f"v{next(_WRITES)}")


@dataclass(frozen=True)
class _MemoryFiles(Files):
    store: MemoryStore
    prefix: str

    @property
    def location(self) -> str:
        return f"memory/{self.prefix}".rstrip("/")

    @property
    def here(self) -> None:
        return None

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        found = self.store.sizes(f"{self.prefix}{folder}".rstrip("/"), deep=deep)
        return {name.removeprefix(self.prefix): size for name, size in found.items()}

    def size(self, name: str) -> int | None:
        # Not a step of its own: reading is, and says as well that there is nothing.
        found = self.store.objects.get(self.prefix + name)
        return None if found is None else len(found[0])

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        found = self.store.get(self.prefix + name)
        if found is None:
            raise InputError("no such file", source=name)
        return bytearray(found[0][start:][:size])

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read(name, start, len(buffer))

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def fingerprint(self, name: str) -> list[Any]:
        return [name, self.store.objects[self.prefix + name][1]]

    def settled(self, name: str) -> bool:
        return True

    def folder(self, names: Iterable[str]) -> Path:
        raise NotImplementedError


class _Turns:
    """Lets one of several threads make one step at a time."""

    def __init__(self, commands: Sequence[Callable[[], Any]]) -> None:
        self.results: list[Any] = [None] * len(commands)
        self._local = threading.local()
        self._go = [threading.Semaphore(0) for _ in commands]
        self._came = threading.Semaphore(0)
        self.done = [False] * len(commands)
        self._threads = [
            threading.Thread(target=self._run, args=(i, command), daemon=True)
            for i, command in enumerate(commands)
        ]

    def _run(self, index: int, command: Callable[[], Any]) -> None:
        self._local.index = index
        self._go[index].acquire()
        try:
            self.results[index] = command()
        except Exception as error:
            self.results[index] = error
        self.done[index] = True
        self._came.release()

    def wait(self, operation: str, name: str) -> None:
        """Called before each step: hand over, and go on when it is this thread's turn again."""
        index = getattr(self._local, "index", None)
        if index is not None:
            self._came.release()
            self._go[index].acquire()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def step(self, index: int) -> bool:
        """Let a command go on to its next step; whether it did."""
        if self.done[index]:
            return False
        self._go[index].release()
        assert self._came.acquire(timeout=30)
        return True


def interleave(
    store: MemoryStore, commands: Sequence[Callable[[], Any]], order: Iterable[int]
) -> list[Any]:
    """Run commands at the same time, one step each time its number comes in `order`.

    Commands that have not ended then are run to their ends, one after the other. Gives what each
    returned, or the exception it raised.
    """
    turns = _Turns(commands)
    before, store.before = store.before, turns.wait
    try:
        turns.start()
        for index in range(len(commands)):
            turns.step(index)  # up to its first step
        for index in order:
            turns.step(index)
        for index in range(len(commands)):
            while turns.step(index):
                pass
    finally:
        store.before = before
    return turns.results


def steps_of(store: MemoryStore, command: Callable[[], Any]) -> list[str]:
    """The steps that a command makes when it is alone."""
    steps: list[str] = []
    before, store.before = store.before, lambda operation, name: steps.append(f"{operation} {name}")
    try:
        command()
    finally:
        store.before = before
    return steps
