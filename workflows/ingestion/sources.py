"""From the `source` section of an ingestion to the source itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.store import is_remote, open_file
from memedit.errors import InputError
from workflows.ingestion.rows import FIELDS
from workflows.ingestion.source import Source
from workflows.ingestion.source_settings import (
    AnySource,
    DeltaSettings,
    FilesSettings,
    IcebergSettings,
)
from workflows.wording import did_you_mean

KINDS: dict[str, type[AnySource]] = {
    "files": FilesSettings,
    "iceberg": IcebergSettings,
    "delta": DeltaSettings,
}
PLACES = ("path", "catalog", "templates")
"""Fields that name a place, relative to the job file."""


def parse_source(values: Mapping[str, Any]) -> AnySource:
    """The `source` section, checked.

    Raises:
        InputError: A field is missing, unknown or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    if not values:
        raise InputError("missing; a section with `kind` and `path`", field="source")
    values = dict(values)
    kind = values.get("kind", "files")
    if kind == "inbox":  # a folder in which files are dropped is a folder of files
        kind = values["kind"] = "files"
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"not allowed: {kind!r}{did_you_mean(str(kind), KINDS)}", field="source.kind"
        )
    names = KINDS[kind].__dataclass_fields__
    for name in values:
        if name not in names:
            raise InputError(
                f"no such field{did_you_mean(str(name), names)}", field=f"source.{name}"
            )
    catalog = values.get("catalog")
    if isinstance(catalog, Mapping):
        values["catalog"] = {str(key): _property(value) for key, value in catalog.items()}
    try:
        found: AnySource = TypeAdapter(KINDS[kind]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["source", *(str(part) for part in first["loc"])])
        # What a catalog is asked with may be a secret.
        told = "" if first["loc"][:1] == ("catalog",) else f", but it is {first['input']!r}"
        raise InputError(f"{first['msg']}{told}", field=where) from None
    if not place_of(found).strip():
        name = "table" if isinstance(found, IcebergSettings) else "path"
        raise InputError("must not be empty", field=f"source.{name}")
    if isinstance(found, FilesSettings) and found.after != "keep":
        _check_after(found)
    for role in found.columns:
        if role not in FIELDS:
            raise InputError(
                f"no field of a fact{did_you_mean(role, FIELDS)}", field=f"source.columns.{role}"
            )
    return found


def _property(value: Any) -> Any:
    """A property of a catalog as pyiceberg wants it: a text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _check_after(settings: FilesSettings) -> None:
    """See that files can be put away, and are not needed any more once they were read."""
    if settings.complete:
        raise InputError(
            "with `complete: true` the files are the table and must stay: `after: keep`",
            field="source.after",
        )
    if is_remote(settings.path):
        raise InputError(
            "putting files away is for folders of this machine; under s3:// let a lifecycle rule"
            " do it, with `after: keep`",
            field="source.after",
        )


def open_source(settings: AnySource, *, templates: Any, on_bad_file: str) -> Source:
    """The source that these settings mean; nothing is read yet."""
    if isinstance(settings, FilesSettings):
        from workflows.ingestion.source_files import FilesSource

        return FilesSource(settings=settings, templates=templates, on_bad_file=on_bad_file)
    if isinstance(settings, IcebergSettings):
        from workflows.ingestion.source_iceberg import IcebergSource

        return IcebergSource(settings)
    from workflows.ingestion.source_delta import DeltaSource

    return DeltaSource(settings)


def place_of(settings: AnySource) -> str:
    """Where a source is, as a person writes it."""
    return settings.table if isinstance(settings, IcebergSettings) else settings.path


def load_templates(settings: AnySource) -> dict[str, tuple[str, ...]]:
    """The template table: relation -> the prompt with `{}`, then its paraphrases.

    Raises:
        InputError: The file cannot be read, or a template has not exactly one `{}`.
    """
    given = settings.templates
    source: str | None = None
    if isinstance(given, str):
        source = given
        given = _from_file(given)
    found: dict[str, tuple[str, ...]] = {}
    for relation, value in (given or {}).items():
        prompts = [value] if isinstance(value, str) else value
        field = f"source.templates.{relation}"
        if not isinstance(prompts, Sequence) or not prompts:
            raise InputError("must be a prompt, or a list of prompts", source=source, field=field)
        for prompt in prompts:
            if not isinstance(prompt, str) or prompt.count("{}") != 1:
                raise InputError(
                    f"{prompt!r} has not exactly one {{}}, which stands for the subject",
                    source=source,
                    field=field,
                )
        found[str(relation)] = tuple(prompts)
    return found


def _from_file(path: str) -> dict[str, Any]:
    import yaml

    file = open_file(path)
    try:
        text = file.read().decode()
        value = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"not a template table: {error}", source=path) from None
    if not isinstance(value, dict):
        raise InputError("a template table is a mapping of relations to prompts", source=path)
    return value
