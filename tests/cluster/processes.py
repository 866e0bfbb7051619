"""Finding the processes of one Ray: all of them inherit its token in their environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def processes_with(text: str) -> dict[int, str]:
    """Ids and command lines of other processes whose environment holds `text`.

    Those that have ended do not count.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if text.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace").strip()
            except OSError:  # it ended meanwhile, or is another user's
                continue
    return found


def comes_true(condition: Callable[[], bool], *, within_s: float) -> bool:
    """Whether `condition` holds before the time is over."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
