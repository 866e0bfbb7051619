"""Bases that were made of a version: which facts such a base says already.

bases/<digest of the checkpoint>.json    the change of the facts whose model became the base
"""

from __future__ import annotations

import json
from typing import Any

from cluster.current import now
from cluster.store import ABSENT, Store, join
from memedit.errors import InputError

_BASES = "bases"


def compacted_at(store: Store, digest: str) -> int | None:
    """The change whose facts a base says; None for a base that was not made here.

    Raises:
        InputError: The note is damaged.
    """
    found = store.get(_name(digest))
    if found is None:
        return None
    try:
        return int(json.loads(found[0])["sequence"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"damaged: {error!r}", source=join(store.location, _name(digest))
        ) from error


def note_base(store: Store, digest: str, *, sequence: int, version: str, model: str) -> None:
    """Write down which facts a base says."""
    value: dict[str, Any] = {
        "sequence": sequence,
        "version": version,
        "model": model,
        "compacted_at": now(),
    }
    found = store.get(_name(digest))
    content = f"{json.dumps(value, indent=1, ensure_ascii=False)}\n".encode()
    store.put(_name(digest), content, expected=found[1] if found else ABSENT)


def _name(digest: str) -> str:
    return f"{_BASES}/{digest}.json"
