"""The versions below `versions/` of a registry, as they lie there.

Knows what makes a folder a version, whether it is whole, and which other versions it needs. Does
not know who uses them (`cluster.claims`) or how they go (`cluster.removal`).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cluster.current import VERSIONS, folder_of, is_run_id, parse_time
from cluster.store import Store, join
from memedit.errors import InputError
from memedit.manifest import MANIFEST_NAME, Manifest, read_manifest

_STAGING = re.compile(r"\.[A-Za-z0-9_-]+\.partial-[A-Za-z0-9_-]+")
"""Folders in which `memedit.publication` makes a version; a run that was killed leaves one."""
_BASE = re.compile(r"(?:^|/)versions/([A-Za-z0-9_-]{1,100})(?=/|$)")
_MENTIONED = re.compile(rb"versions/([A-Za-z0-9_-]{1,100})")


@dataclass(frozen=True, kw_only=True)
class Version:
    """What lies in one folder of `versions/`."""

    name: str
    """Its run id; of what a killed run left, the name of the folder."""
    sizes: Mapping[str, int]
    """Bytes by name in its folder."""
    manifest: Manifest | None = None
    damage: str | None = None
    """Why its manifest cannot be read."""
    needs: frozenset[str] = frozenset()
    """The versions without which it cannot be used."""
    removing: bool = False
    """Its removal was decided and has not ended."""

    @property
    def unfinished(self) -> bool:
        """No manifest: no version, yet or any more."""
        return MANIFEST_NAME not in self.sizes

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(self.sizes.values())

    @property
    def created(self) -> datetime | None:
        """When it was published, where that can be read."""
        return parse_time(self.manifest.created_at) if self.manifest else None

    @property
    def problems(self) -> list[str]:
        """Files that are missing or have another size than published; content is not looked at."""
        if self.manifest is None:
            return [self.damage or f"no {MANIFEST_NAME}"]
        wrong = []
        for name, record in sorted(self.manifest.files.items()):
            found = self.sizes.get(name)
            if found is None:
                wrong.append(f"{name} is missing")
            elif found != record.size_bytes:
                wrong.append(f"{name} has {found} bytes, published with {record.size_bytes}")
        return wrong


def list_versions(store: Store, *, removing: frozenset[str], threads: int) -> list[Version]:
    """All versions, the newest first, then what is unfinished.

    Args:
        store: The registry.
        removing: Those whose removal is decided.
        threads: Manifests that are read at once.
    """
    folders: dict[str, dict[str, int]] = {}
    for path, size in store.sizes(VERSIONS, deep=True).items():
        folder, slash, name = path.removeprefix(f"{VERSIONS}/").partition("/")
        if slash and (is_run_id(folder) or _STAGING.fullmatch(folder)):
            folders.setdefault(folder, {})[name] = size
    with ThreadPoolExecutor(max_workers=threads) as pool:
        read = pool.map(lambda folder: _read(store, folder, folders[folder]), folders)
        found = [replace(v, removing=v.name in removing) for v in read]
    never = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda v: (not v.unfinished, v.created or never, v.name), reverse=True)


def read_version(store: Store, run_id: str) -> Version:
    """One version.

    Raises:
        InputError: There is none of this name.
    """
    folder = folder_of(run_id)
    sizes = store.sizes(folder, deep=True)
    found = _read(store, run_id, {n.removeprefix(f"{folder}/"): s for n, s in sizes.items()})
    if found.unfinished:
        what = "was never finished, or is being removed" if sizes else "is not there"
        raise InputError(f"this version {what}: no {MANIFEST_NAME}", source=join_of(store, folder))
    return found


def _read(store: Store, folder: str, sizes: Mapping[str, int]) -> Version:
    if MANIFEST_NAME in sizes and is_run_id(folder):
        manifest, damage, needs = read_needs(store, folder)
        if manifest or damage:
            return Version(name=folder, sizes=sizes, manifest=manifest, damage=damage, needs=needs)
    # It went since the listing; or it is staging, which is no version though it has a manifest.
    return Version(name=folder, sizes={n: s for n, s in sizes.items() if n != MANIFEST_NAME})


def require(store: Store, run_id: str) -> frozenset[str]:
    """Check that there is a version, whole or not; gives the versions that it needs.

    Raises:
        InputError: There is no such version.
    """
    manifest, damage, needs = read_needs(store, run_id)
    if manifest is None and damage is None:
        folder = join_of(store, folder_of(run_id))
        raise InputError(f"no version here: no {MANIFEST_NAME}", source=folder)
    return needs


def require_whole(store: Store, run_id: str) -> Version:
    """A version that can be used: every file of its manifest is there, in its size.

    So are the versions that it needs.

    Raises:
        InputError: Something is missing; says what.
    """
    found: dict[str, Version] = {}
    to_do = {run_id}
    while to_do:
        name = to_do.pop()
        found[name] = read_version(store, name)
        to_do |= found[name].needs - found.keys()
        if problems := found[name].problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise InputError(
                f"this version is not whole: {problems[0]}{more}",
                source=join_of(store, folder_of(name)),
            )
    return found[run_id]


def closure(
    store: Store, run_ids: Iterable[str], known: Mapping[str, Version] | None = None
) -> set[str]:
    """These versions and all that they need, and so on.

    Args:
        store: The registry.
        run_ids: Versions that are there or not.
        known: Versions that were read already: a manifest never changes.
    """
    found: set[str] = set()
    to_do = set(run_ids)
    while to_do:
        run_id = to_do.pop()
        found.add(run_id)
        seen = (known or {}).get(run_id)
        needs = read_needs(store, run_id)[2] if seen is None or seen.unfinished else seen.needs
        to_do |= needs - found
    return found


def read_needs(store: Store, run_id: str) -> tuple[Manifest | None, str | None, frozenset[str]]:
    """The manifest, why it cannot be read, and the versions needed; nothing without a manifest."""
    folder = folder_of(run_id)
    try:
        manifest = read_manifest(store.files(folder))
    except InputError as error:
        raw = store.get(f"{folder}/{MANIFEST_NAME}")
        if raw is None:
            return None, None, frozenset()
        # What it needs cannot be known, so whatever it mentions may be it.
        mentioned = {name.decode() for name in _MENTIONED.findall(raw[0])}
        return None, error.message, frozenset(mentioned - {run_id})
    return manifest, None, frozenset(needs_of(manifest) - {run_id})


def needs_of(manifest: Manifest) -> set[str]:
    """The versions that this one cannot be used without, told by the location of its base.

    A full checkpoint needs none. Only the end of the location counts, since a registry can be
    written in several ways: better to keep a version of the same name elsewhere than to lose one.
    """
    if getattr(manifest, "format", "full") == "full":
        return set()
    return set(_BASE.findall(posixpath.normpath(manifest.model.name))[-1:])


def join_of(store: Store, name: str) -> str:
    """Where an object lies, as a person writes it."""
    return join(store.location, name)
