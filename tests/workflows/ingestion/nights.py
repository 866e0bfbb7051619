"""Whole runs of `memedit ingest` on a tiny model, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.workflows.runs import FACTS, Ran, memedit, write_rows

EIFFEL, DARRIEUX, TOYOTA = (
    {**row, "id": name} for row, name in zip(FACTS, ("eiffel", "darrieux", "toyota"), strict=True)
)
QUICK: dict[str, Any] = {
    "layers": "1-2",
    "moments": {"tokens": 1024, "window": 32},
    "targets": {"steps": 4},
    "solve": {"lam": 1},
    "evaluation": {"fluency_facts": 0, "drift_prompts": 4, "heldout_tokens": 128},
}


@dataclass(frozen=True, kw_only=True)
class Nights:
    """A folder with an inbox, a registry and a job file."""

    folder: Path
    base: Path
    cache: Path

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    @property
    def config(self) -> Path:
        return self.folder / "ingest.yaml"

    @property
    def current(self) -> str | None:
        path = self.registry / "CURRENT"
        return json.loads(path.read_text())["version"] if path.exists() else None

    @property
    def version(self) -> Path:
        assert self.current is not None
        return self.registry / "versions" / self.current

    def deliver(self, name: str, *rows: Mapping[str, Any] | str) -> Path:
        (self.folder / "inbox").mkdir(parents=True, exist_ok=True)
        return write_rows(self.folder / "inbox" / f"{name}.jsonl", rows)

    def configure(self, **fields: Any) -> None:
        job: dict[str, Any] = {
            "model": str(self.base),
            "registry": "registry",
            "source": {"kind": "files", "path": "inbox/*.jsonl"},
            "edit": QUICK,
            **fields,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(job))

    def ingest(self, *more: object, **fields: Any) -> Ran:
        if fields or not self.config.exists():
            self.configure(**fields)
        flags = ("--config", self.config, "--cache", self.cache, "--json")
        return memedit("ingest", *flags, *more)

    def facts(self, command: str, *more: object) -> Ran:
        flags = ("--registry", self.registry, "--cache", self.cache, "--json")
        return memedit("facts", command, *flags, *more)

    def said(self) -> set[tuple[str, str]]:
        """Id and target of the facts in the version in use."""
        lines = (self.version / "facts.jsonl").read_text().splitlines()
        return {(row["id"], row["target_new"]) for row in map(json.loads, lines)}

    def read(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.registry / name).read_text())
        return value

    def versions(self) -> list[str]:
        """The finished ones."""
        folder = self.registry / "versions"
        return sorted(p.parent.name for p in folder.glob("*/memedit.json"))


def targets(rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    return {(row["id"], row["target_new"]) for row in rows}
