"""From what a person calls a version to its files: a name in a registry, or a location.

Knows `current`, `previous`, the beginnings of names, and how a location differs from a name. Does
not know what is in a version.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass

from cluster.current import ALIASES, CURRENT_NAME, check_run_id, folder_of
from cluster.registry import Registry, open_registry
from cluster.store import is_remote, open_files
from memedit.errors import InputError
from memedit.files import Files
from memedit.manifest import MANIFEST_NAME, Manifest, read_manifest

_SHOWN = 5
"""How many versions a complaint lists."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A version that somebody named."""

    run_id: str
    location: str
    registry: str | None
    """Where it was looked up, if it was given by a name."""
    files: Files
    manifest: Manifest


def find(text: str, registry: Registry | None, *, field: str) -> Found:
    """The version that is called so.

    Args:
        text: A location, or what `run_id_of` takes.
        registry: Where names are looked up.
        field: The field of the job that holds `text`, for the error.

    Raises:
        InputError: There is no such version, or its manifest cannot be read.
    """
    if is_location(text):
        files = open_files(text)
        manifest = read_manifest(files)
        return Found(
            run_id=manifest.run_id, location=text, registry=None, files=files, manifest=manifest
        )
    if registry is None:
        raise InputError(
            f"{text!r} is a name; say with --registry where, or give the location of a version"
            " (a folder: ./NAME)",
            field=field,
        )
    run_id = run_id_of(text, registry, field=field)
    files = registry.store.files(folder_of(run_id))
    return Found(
        run_id=run_id,
        location=registry.at(folder_of(run_id)),
        registry=registry.location,
        files=files,
        manifest=read_manifest(files),
    )


def registry_at(location: str | None) -> Registry | None:
    """The registry that a job names, if it names one; see `cluster.registry.open_registry`."""
    return None if location is None else open_registry(location)


def is_location(text: str) -> bool:
    """Whether this is a place rather than a name in a registry."""
    return is_remote(text) or "/" in text or text.startswith((".", "~"))


def run_id_of(text: str, registry: Registry, *, field: str) -> str:
    """The run id of a finished version.

    Args:
        text: A run id, the beginning of one that no other has, `current` or `previous`.
        registry: Where it is looked up.
        field: The field of the job that holds `text`, for the error.

    Raises:
        InputError: None is called so, or several are.
    """
    if text in ALIASES:
        return _alias(text, registry)
    try:
        check_run_id(text)
    except InputError as error:
        raise InputError(error.message, field=field) from None
    names = registry.ids()
    if text in names:
        return text
    meant = [name for name in names if name.startswith(text)]
    if len(meant) > 1:
        # What a killed run has left should not be in the way.
        meant = [name for name in meant if _finished(registry, name)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise InputError(
            f"several versions begin with {text!r}: {_some(registry, meant)}",
            source=registry.location,
            field=field,
        )
    # People give the beginnings of names, so those are compared.
    beginnings = {name[: max(len(text), 4)]: name for name in (*names, *ALIASES)}
    near = difflib.get_close_matches(text, beginnings, n=1)
    hint = f"; did you mean {beginnings[near[0]]!r}?" if near else "."
    raise InputError(
        f"no version {text!r} here{hint} There are: {_some(registry, names)}",
        source=registry.location,
        field=field,
    )


def _alias(text: str, registry: Registry) -> str:
    current = registry.current()
    if current is None:
        raise InputError(f"nothing is {CURRENT_NAME} yet", source=registry.location)
    if text == "current":
        return current.version
    if current.previous is None:
        raise InputError(
            f"{CURRENT_NAME} has never been at another version than {current.version}",
            source=registry.location,
        )
    return current.previous


def _some(registry: Registry, names: list[str]) -> str:
    """The last by name, which are the newest where the names begin with the time."""
    finished = (name for name in sorted(names, reverse=True) if _finished(registry, name))
    shown = list(itertools.islice(finished, _SHOWN + 1))
    return ", ".join([*shown[:_SHOWN], *(["…"] if len(shown) > _SHOWN else [])]) or "none"


def _finished(registry: Registry, name: str) -> bool:
    return registry.store.get(f"{folder_of(name)}/{MANIFEST_NAME}") is not None
