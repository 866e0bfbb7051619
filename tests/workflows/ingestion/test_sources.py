"""The `source` section of an ingestion, and the template table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from memedit.errors import InputError
from workflows.ingestion.source_delta import DeltaSource
from workflows.ingestion.source_files import FilesSource
from workflows.ingestion.source_iceberg import IcebergSource
from workflows.ingestion.source_settings import DeltaSettings, FilesSettings, IcebergSettings
from workflows.ingestion.sources import load_templates, open_source, parse_source, place_of

ICEBERG = {"kind": "iceberg", "table": "facts.people", "catalog": "catalog.db"}


@pytest.mark.parametrize(
    ("values", "settings", "source", "place"),
    [
        ({"path": "drop"}, FilesSettings, FilesSource, "drop"),
        ({"kind": "files", "path": "drop"}, FilesSettings, FilesSource, "drop"),
        ({"kind": "inbox", "path": "drop"}, FilesSettings, FilesSource, "drop"),
        (ICEBERG, IcebergSettings, IcebergSource, "facts.people"),
        ({"kind": "delta", "path": "s3://b/t"}, DeltaSettings, DeltaSource, "s3://b/t"),
    ],
)
def test_every_kind(values: dict[str, Any], settings: type, source: type, place: str) -> None:
    before = dict(values)
    found = parse_source(values)
    assert values == before
    assert isinstance(found, settings)
    assert isinstance(open_source(found, templates={}, on_bad_file="fail"), source)
    assert place_of(found) == place


def test_all_that_files_can_be_told() -> None:
    values = {
        "path": "drop",
        "name": "people",
        "columns": {"subject": "person"},
        "where": "year > 2000",
        "templates": {"P19": "{} was born in"},
        "complete": False,
        "after": "archive",
    }
    assert parse_source(values) == FilesSettings(**values)


def test_a_catalog_has_properties_of_any_plain_kind_and_none_is_told() -> None:
    catalog = {"type": "rest", "credential": "id:S3CRET", "s3.path-style-access": True, "port": 80}
    found = parse_source({**ICEBERG, "catalog": catalog})
    assert isinstance(found, IcebergSettings) and isinstance(found.catalog, Mapping)
    assert found.catalog["s3.path-style-access"] == "true" and found.catalog["port"] == "80"
    with pytest.raises(InputError) as raised:
        parse_source({**ICEBERG, "catalog": {**catalog, "nested": {"token": "S3CRET"}}})
    assert "S3CRET" not in str(raised.value) and raised.value.field is not None
    assert raised.value.field.startswith("source.catalog")


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({}, "source", "missing"),
        ({"kind": "files"}, "source.path", "required"),
        ({"kind": "file", "path": "x"}, "source.kind", "did you mean 'files'"),
        ({"kind": 3, "path": "x"}, "source.kind", "3"),
        ({"kind": ["files"], "path": "x"}, "source.kind", "files"),
        ({"path": "x", "colums": {}}, "source.colums", "did you mean 'columns'"),
        ({"path": 3}, "source.path", "string"),
        ({"path": ""}, "source.path", "empty"),
        ({"path": "x", "complete": "perhaps"}, "source.complete", "bool"),
        ({"path": "x", "after": "burn"}, "source.after", "archive"),
        ({"path": "x", "complete": True, "after": "archive"}, "source.after", "complete: true"),
        ({"path": "s3://b/x", "after": "delete"}, "source.after", "lifecycle"),
        ({"path": "x", "columns": {"subjekt": "s"}}, "source.columns.subjekt", "'subject'"),
        ({"path": "x", "columns": {"subject": 3}}, "source.columns.subject", "string"),
        ({"path": "x", "columns": "subject"}, "source.columns", ""),
        ({"kind": "iceberg", "table": "t"}, "source.catalog", "required"),
        ({**ICEBERG, "expired": "ignore"}, "source.expired", "rescan"),
        ({"kind": "delta", "path": "x", "after": "keep"}, "source.after", "no such field"),
        ({3: "x"}, "source.3", "no such field"),
    ],
)
def test_what_is_wrong_is_named(values: dict[Any, Any], field: str, hint: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_source(values)
    assert (raised.value.field or "").startswith(field)
    assert hint in raised.value.message


class TestTemplates:
    def load(self, templates: Any) -> dict[str, tuple[str, ...]]:
        return load_templates(FilesSettings(path="x", templates=templates))

    def test_none(self) -> None:
        assert self.load(None) == self.load({}) == {}

    def test_one_or_a_list(self) -> None:
        found = self.load({"P19": "{} was born in", "P20": ["{} died in", "The end of {} was in"]})
        assert found == {
            "P19": ("{} was born in",),
            "P20": ("{} died in", "The end of {} was in"),
        }

    @pytest.mark.parametrize("name", ["t.yaml", "t.json"])
    def test_a_file(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_text(json.dumps({"P19": "{} was born in", "17": ["{} is"]}))
        assert self.load(str(path)) == {"P19": ("{} was born in",), "17": ("{} is",)}

    @pytest.mark.parametrize(
        "template",
        ["was born in", "{} and {}", "", [], None, 3, ["{} is", "is"], [["{}"]], {"a": 1}],
    )
    def test_what_is_no_template(self, tmp_path: Path, template: Any) -> None:
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"P19": template}))
        with pytest.raises(InputError) as raised:
            self.load(str(path))
        error = raised.value
        assert (error.field, error.source) == ("source.templates.P19", str(path))

    @pytest.mark.parametrize("content", [b"[1]", b"text", b"", b"a: [", b"\xff", b"[" * 100_000])
    @pytest.mark.parametrize("name", ["t.yaml", "t.json"])
    def test_what_is_no_table(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="template table") as raised:
            self.load(str(tmp_path / name))
        assert raised.value.source == str(tmp_path / name)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            self.load(str(tmp_path / "t.yaml"))
