"""Corpora for the second moments: many kinds of sources in, one stream of documents out.

Knows file formats, folders and Hugging Face data sets, and what identifies their content. Does not
know tokens or windows (`memedit.moments`), nor how a model samples its own text (kind "self").
"""

from __future__ import annotations

import glob
import hashlib
import heapq
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

from cluster.store import is_remote, open_file, open_files
from memedit.checksums import record_of
from memedit.errors import InputError
from memedit.files import File, file_of

Kind = Literal["parquet", "json lines", "text", "dataset", "self"]

_KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".txt": "text",
}
_ROWS_PER_BATCH = 64
_PIECE_SIZE = 1 << 20
"""A text file is handed on in pieces of about this many characters, cut at line ends."""
MOST_DOCUMENTS = 50_000
MOST_CHARACTERS = 200_000_000
"""How far into a corpus a sample of it looks, whichever comes first."""


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """A Hugging Face data set, or the folder that `save_to_disk` wrote one into."""

    name: str
    config: str | None = None
    split: str = "train"
    saved: bool = False

    def __str__(self) -> str:
        return ":".join((self.name, self.config or "", self.split))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source of documents that can be read any number of times; small enough to be sent about.

    `files` are sorted; `dataset` is set instead for kind "dataset". Kind "self" is a mark: the
    text comes from the model that is edited, and there is nothing to read here.
    """

    kind: Kind
    spec: str
    column: str = "text"
    files: tuple[File, ...] = ()
    dataset: DatasetName | None = None
    checksums: Path | None = None
    """Folder in which the checksums of files are kept from run to run."""

    def documents(self) -> Iterator[str]:
        """Yield the documents that hold any text, a few in memory at a time.

        Raises:
            InputError: A file or row is not as it should be, or the kind is "self".
        """
        if self.kind == "self":
            raise InputError(
                "this corpus is sampled from the model and cannot be read", source=self.spec
            )
        if self.dataset is not None:
            parts = _dataset_texts(self.dataset, self.column)
        else:
            read = _READERS[self.kind]
            parts = (text for file in self.files for text in read(file, self.column))
        return (text for text in parts if text.strip())

    @cached_property
    def digest(self) -> str:
        """sha256 of the content: equal texts under other file names have an equal digest."""
        if self.dataset is not None:
            content = _dataset_identity(self.dataset)
        else:
            content = [record_of(file, cache=self.checksums).sha256 for file in self.files]
        identity = json.dumps([self.kind, self.column, content], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()


def open_corpus(spec: str | os.PathLike[str], *, column: str = "text") -> Corpus:
    """Find out what a corpus is and check that it holds at least one document.

    Args:
        spec: A file, a folder (searched with its sub-folders) or a glob of Parquet, JSON lines or
            text files, here or at `s3://`; a folder written by `Dataset.save_to_disk`, or
            `folder:split`; a Hugging Face data set as `id`, `id:config` or `id:config:split`; or
            `self`. A path wins over a data set of the same name.
        column: The column (Parquet, data sets) or field (JSON lines) that holds the text.

    Raises:
        InputError: No such path, no such column, a format that is not known, or no document.
    """
    only_path = isinstance(spec, os.PathLike)
    spec = os.fspath(spec)
    if spec == "self" and not only_path:
        return Corpus(kind="self", spec=spec, column=column)
    dataset = _saved_dataset(spec)
    files = () if dataset else _find_files(spec)
    if not dataset and not files:
        dataset = None if only_path or is_remote(spec) else _hub_dataset(spec)
        if dataset is None:
            raise InputError(
                f"no such file, folder or glob match; a corpus is {_suffixes()} files, a data set "
                "written id:config:split, or self",
                source=spec,
            )
    kind: Kind = "dataset" if dataset else _kind_of(files, spec)
    corpus = Corpus(kind=kind, spec=spec, column=column, files=files, dataset=dataset)
    for file in files if kind == "parquet" else ():
        _check_parquet(file, column)
    if next(corpus.documents(), None) is None:
        raise InputError("no document with any text in it", source=spec)
    return corpus


def sample_documents(
    documents: Iterable[str], *, characters: int, at_least: int, seed: int
) -> list[str]:
    """A sample of a stream of documents, in their order, of at most `characters` characters.

    Long documents are shortened before any is left out, but none to less than `at_least`
    characters. Those that do not fit even so are left out at random (by `seed`), with equal
    chances all over the stream. Only the first `MOST_DOCUMENTS` documents, or `MOST_CHARACTERS`
    characters if that is less, are read: what lies beyond them has no chance. Memory is bounded by
    `characters` and one document.
    """
    random = Random(seed)
    kept: dict[int, str] = {}
    queue: list[tuple[float, int]] = []  # the document with the highest draw leaves first
    longest, total, read, highest = characters, 0, 0, 1.0
    for i, text in enumerate(islice(documents, MOST_DOCUMENTS)):
        draw = random.random()
        if draw < highest:
            kept[i] = text[:longest]
            total += len(kept[i])
            heapq.heappush(queue, (-draw, i))
        while total > characters and longest > at_least:
            longest = max(at_least, longest * 3 // 4)
            kept = {j: known[:longest] for j, known in kept.items()}
            total = sum(map(len, kept.values()))
        while total > characters and len(kept) > 1:
            highest, j = heapq.heappop(queue)
            highest = -highest
            total -= len(kept.pop(j))
        read += len(text)
        if read >= MOST_CHARACTERS:
            break
    return list(kept.values())


# --- What a spec means -------------------------------------------------------------------------


def _find_files(spec: str) -> tuple[File, ...]:
    """The corpus files at a path or glob, sorted; none if nothing is there."""
    if is_remote(spec):
        return _find_objects(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        # Names that begin with . or _ are notes of the tools that write such folders.
        files = [
            file
            for file in path.rglob("*")
            if file.suffix.lower() in _KINDS
            and file.is_file()
            and not any(part[0] in "._" for part in file.relative_to(path).parts)
        ]
        if not files:
            raise InputError(f"no {_suffixes()} file in this folder", source=spec)
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [file for file in files if file.is_file()]
    return tuple(map(file_of, sorted(files)))


def _find_objects(spec: str) -> tuple[File, ...]:
    """The same in object storage, where * matches a / too."""
    fixed = spec[: min(spec.find(c) for c in "*?[" if c in spec)] if set("*?[") & {*spec} else None
    if fixed is not None:
        place = open_files(fixed.rpartition("/")[0])
        pattern = spec[len(fixed.rpartition("/")[0]) + 1 :]
        return tuple(File(place, n) for n in place.sizes(deep=True) if fnmatch(n, pattern))
    file = open_file(spec)
    if file.suffix in _KINDS and file.files.size(file.name) is not None:
        return (file,)
    place = open_files(spec)
    names = [
        name
        for name in place.sizes(deep=True)
        if os.path.splitext(name)[1].lower() in _KINDS
        and not any(part[0] in "._" for part in name.split("/"))
    ]
    if not names:
        raise InputError(f"no {_suffixes()} file at this place", source=spec)
    return tuple(File(place, name) for name in names)


def _kind_of(files: tuple[File, ...], spec: str) -> Kind:
    kinds = set()
    for file in files:
        kind = _KINDS.get(file.suffix)
        if kind is None:
            raise InputError(
                f"unknown suffix {file.suffix!r}; a corpus is made of {_suffixes()} files",
                source=file,
            )
        kinds.add(kind)
    if len(kinds) > 1:
        raise InputError(
            f"found {' and '.join(sorted(kinds))} files; name those that are meant with a glob "
            "such as 'folder/*.parquet'",
            source=spec,
        )
    return kinds.pop()


def _suffixes() -> str:
    return ", ".join(_KINDS)


def _saved_dataset(spec: str) -> DatasetName | None:
    """The data set in a folder that `save_to_disk` wrote, if this names one."""
    if is_remote(spec):
        return None
    name, _, split = spec.partition(":")
    for folder, wanted in ((spec, "train"), (name, split or "train")):
        path = Path(folder).expanduser()
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return DatasetName(name=str(path), split=wanted, saved=True)
    return None


def _hub_dataset(spec: str) -> DatasetName | None:
    """The data set that this could name, or None where it can only be meant as a path."""
    name, *rest = spec.split(":")
    is_file = Path(name).suffix.lower() in (*_KINDS, ".json", ".csv", ".arrow", ".gz", ".zst")
    if is_file or len(rest) > 2 or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return None
    config, split = [*rest, "", ""][:2]
    return DatasetName(name=name, config=config or None, split=split or "train")


# --- Files -------------------------------------------------------------------------------------


def _check_parquet(file: File, column: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as content:
            schema = pq.read_schema(content)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable Parquet file: {error}", source=file) from None
    if column not in schema.names:
        raise _no_column(column, schema.names, source=file)
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"expected a column of text, found {kind}", source=file, field=column)


def _parquet_texts(file: File, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as content, pq.ParquetFile(content) as table:
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable Parquet file: {error}", source=file) from None


def _json_texts(file: File, column: str) -> Iterator[str]:
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"not JSON: {error}", source=file, row=number) from None
            if not isinstance(row, dict):
                raise InputError(
                    f"expected an object with {column!r}, found {type(row).__name__}",
                    source=file,
                    row=number,
                )
            if column not in row:
                raise _no_column(column, list(row), source=file, row=number)
            yield from _text(row[column], column, source=file, row=number)


def _file_texts(file: File, column: str) -> Iterator[str]:
    """One file is one document, unless it is longer than a piece."""
    try:
        with io.TextIOWrapper(cast(Any, file.open()), "utf-8-sig") as lines:
            while piece := lines.readlines(_PIECE_SIZE):
                yield "".join(piece)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}; save the file as UTF-8", source=file) from None


def _text(value: object, column: str, *, source: object, row: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        raise InputError(
            f"expected text, found {type(value).__name__}", source=source, row=row, field=column
        )


def _no_column(
    column: str, found: list[str], *, source: object, row: int | None = None
) -> InputError:
    return InputError(
        f"no column {column!r}; columns found: {', '.join(found) or 'none'}",
        source=source,
        row=row,
        field=column,
    )


_READERS: dict[Kind, Callable[[File, str], Iterator[str]]] = {
    "parquet": _parquet_texts,
    "json lines": _json_texts,
    "text": _file_texts,
}


# --- Hugging Face data sets --------------------------------------------------------------------


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "neither a path that exists nor readable as a data set, because the datasets library "
            "is not installed: pip install 'memedit[datasets]'"
        ) from None
    return datasets


def _load(dataset: DatasetName) -> tuple[Any, Any]:
    """The rows of a data set, read as they are needed, and what identifies their content."""
    try:
        datasets = _datasets()
        if not dataset.saved:
            builder = datasets.load_dataset_builder(dataset.name, dataset.config)
            identity = [dataset.name, builder.config.name, dataset.split, builder.hash]
            return builder.as_streaming_dataset(split=dataset.split), identity
        rows = datasets.load_from_disk(dataset.name, keep_in_memory=False)
        if isinstance(rows, dict):
            if dataset.split not in rows:
                raise InputError(
                    f"no split {dataset.split!r}; splits found: {', '.join(rows)}; "
                    f"write {dataset.name}:split"
                )
            rows = rows[dataset.split]
        return rows, [record_of(Path(file["filename"])).sha256 for file in rows.cache_files]
    except InputError as error:
        raise InputError(error.message, source=dataset) from None
    except Exception as error:  # The library raises many kinds, none of them its own family.
        raise InputError(
            "neither a path that exists nor a data set that can be loaded "
            f"({type(error).__name__}: {error})",
            source=dataset,
        ) from None


def _dataset_identity(dataset: DatasetName) -> Any:
    return _load(dataset)[1]


def _dataset_texts(dataset: DatasetName, column: str) -> Iterator[str]:
    rows, _ = _load(dataset)
    if rows.column_names is not None:
        if column not in rows.column_names:
            raise _no_column(column, list(rows.column_names), source=dataset)
        rows = rows.select_columns([column])
    number = 0
    for batch in rows.iter(batch_size=_ROWS_PER_BATCH):
        if column not in batch:
            raise _no_column(column, list(batch), source=dataset)
        for value in batch[column]:
            number += 1
            yield from _text(value, column, source=dataset, row=number)
