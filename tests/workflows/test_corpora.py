"""Corpora of every kind: found, checked, streamed and identified by content."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memedit.errors import InputError
from workflows import corpora
from workflows.corpora import Corpus, DatasetName, open_corpus, sample_documents

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
TEXTS = ["One.", "Zwei.\nZeilen.", "三"]


def parquet(path: Path, texts: list[Any], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"title": ["t"] * len(texts), column: texts}), path)
    return path


def json_lines(path: Path, texts: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"n": 1, column: text}) + "\n" for text in texts))
    return path


def texts_of(spec: Path | str, **options: str) -> list[str]:
    return list(open_corpus(spec, **options).documents())


class TestFiles:
    @pytest.mark.parametrize(("suffix", "write"), [(".parquet", parquet), (".jsonl", json_lines)])
    def test_a_file_of_rows(self, suffix: str, write: Any, tmp_path: Path) -> None:
        path = write(tmp_path / f"c{suffix}", [*TEXTS, None, " \n"])
        corpus = open_corpus(path)
        assert list(corpus.documents()) == TEXTS
        assert list(corpus.documents()) == TEXTS  # it can be read again
        other = write(tmp_path / f"d{suffix}", TEXTS, "body")
        assert texts_of(other, column="body") == TEXTS

    def test_checksums_are_kept_and_follow_the_file(self, tmp_path: Path) -> None:
        path, cache = tmp_path / "c.txt", tmp_path / "checksums"
        path.write_text("one text")
        os.utime(path, (1, 1))  # long settled

        def digest() -> str:
            return replace(open_corpus(path), checksums=cache).digest

        first = digest()
        assert first == open_corpus(path).digest
        (kept,) = cache.rglob("*.json")
        assert digest() == first
        path.write_text("another text")
        assert digest() != first
        kept.write_text("{damaged")
        assert digest() == open_corpus(path).digest

    def test_one_text_file_is_one_document(self, tmp_path: Path) -> None:
        for name, text in zip("bac", TEXTS, strict=True):
            (tmp_path / f"{name}.txt").write_text(text)
        assert texts_of(tmp_path / "a.txt") == [TEXTS[1]]
        assert texts_of(tmp_path) == [TEXTS[1], TEXTS[0], TEXTS[2]]

    def test_a_long_text_file_comes_in_pieces_cut_at_line_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpora, "_PIECE_SIZE", 100)
        text = "".join(f"line {n}\n" for n in range(100))
        (tmp_path / "long.txt").write_text(text)
        pieces = texts_of(tmp_path / "long.txt")
        assert len(pieces) > 5
        assert "".join(pieces) == text
        assert all(piece.endswith("\n") for piece in pieces)

    def test_folders_and_globs_are_read_in_the_order_of_names(self, tmp_path: Path) -> None:
        parquet(tmp_path / "c" / "day=2" / "x.parquet", ["second"])
        parquet(tmp_path / "c" / "day=1" / "y.parquet", ["first"])
        parquet(tmp_path / "c" / "_tmp" / "z.parquet", ["not this"])
        parquet(tmp_path / "c" / ".hidden.parquet", ["nor this"])
        (tmp_path / "c" / "_SUCCESS").touch()
        (tmp_path / "c" / "README.md").write_text("notes")
        assert texts_of(tmp_path / "c") == ["first", "second"]
        assert texts_of(f"{tmp_path}/c/day=*/*.parquet") == ["first", "second"]

    def test_streams(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = parquet(tmp_path / "c.parquet", [f"text {n}" for n in range(1000)])
        seen: list[int] = []
        read = pq.ParquetFile.iter_batches

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            for batch in read(self, *args, **options):
                seen.append(len(batch))
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
        documents = open_corpus(path).documents()
        seen.clear()
        assert next(documents) == "text 0"
        assert sum(seen) < 100
        assert sum(1 for _ in documents) == 999

    def test_it_can_be_sent_to_another_process(self, tmp_path: Path) -> None:
        corpus = open_corpus(parquet(tmp_path / "c.parquet", TEXTS))
        copy = pickle.loads(pickle.dumps(corpus))
        assert copy == corpus
        assert list(copy.documents()) == TEXTS


class TestDigest:
    def test_follows_the_content_not_the_place(self, tmp_path: Path) -> None:
        first = parquet(tmp_path / "a" / "1.parquet", TEXTS)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert open_corpus(first).digest == open_corpus(tmp_path / "b").digest
        parquet(tmp_path / "b" / "1.parquet", TEXTS[:2])
        assert open_corpus(first).digest != open_corpus(tmp_path / "b").digest

    def test_follows_column_and_kind(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "c.jsonl", ["same"])
        (tmp_path / "c.txt").write_bytes(path.read_bytes())
        path.write_text(json.dumps({"text": "same", "body": "same"}) + "\n")
        (tmp_path / "c.txt").write_bytes(path.read_bytes())
        digests = {
            open_corpus(path).digest,
            open_corpus(path, column="body").digest,
            open_corpus(tmp_path / "c.txt").digest,
        }
        assert len(digests) == 3


class TestErrors:
    @pytest.mark.parametrize(
        "spec",
        ["none.parquet", "no/such/folder/here", "./nothing", "none*.jsonl", "none.json", "a:b:c:d"],
    )
    def test_no_such_path(self, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="no such file, folder or glob match") as raised:
            open_corpus(spec)
        assert raised.value.source == spec

    def test_a_path_object_is_never_a_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            open_corpus(Path("nothing"))

    def test_wrong_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "c.xlsx").write_text("x")
        with pytest.raises(InputError, match=r"'\.xlsx'.*\.parquet"):
            open_corpus(tmp_path / "c.xlsx")

    def test_a_folder_without_corpus_files(self, tmp_path: Path) -> None:
        (tmp_path / "notes.md").write_text("x")
        with pytest.raises(InputError, match=r"no .* file in this folder"):
            open_corpus(tmp_path)

    def test_a_folder_of_several_kinds(self, tmp_path: Path) -> None:
        parquet(tmp_path / "a.parquet", TEXTS)
        json_lines(tmp_path / "b.jsonl", TEXTS)
        with pytest.raises(InputError, match="json lines and parquet"):
            open_corpus(tmp_path)
        assert texts_of(f"{tmp_path}/*.jsonl") == TEXTS

    @pytest.mark.parametrize(("suffix", "write"), [(".parquet", parquet), (".jsonl", json_lines)])
    def test_no_text_column(self, suffix: str, write: Any, tmp_path: Path) -> None:
        path = write(tmp_path / f"c{suffix}", TEXTS, "body")
        with pytest.raises(
            InputError, match=r"no column 'text'; columns found: .*, body"
        ) as raised:
            open_corpus(path)
        assert (str(raised.value.source), raised.value.field) == (str(path), "text")

    def test_a_column_that_is_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="expected a column of text, found int64"):
            open_corpus(parquet(tmp_path / "c.parquet", [1, 2]))
        with pytest.raises(InputError, match="expected text, found int") as raised:
            open_corpus(json_lines(tmp_path / "c.jsonl", [1]))
        assert raised.value.row == 1

    @pytest.mark.parametrize("texts", [[], [None, ""], [" ", "\n"]])
    def test_empty(self, texts: list[Any], tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "c.parquet")
        json_lines(tmp_path / "c.jsonl", texts)
        (tmp_path / "c.txt").write_text("".join(t or "" for t in texts))
        for suffix in ("parquet", "jsonl", "txt"):
            with pytest.raises(InputError, match="no document"):
                open_corpus(tmp_path / f"c.{suffix}")

    def test_a_bad_line_later_names_its_place(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "c.jsonl", TEXTS)
        for bad, reason in ((b"{", "not JSON"), (b'"\xff"', "not JSON"), (b"[]", "found list")):
            path.write_bytes(b'{"text": "good"}\n' + bad + b"\n")
            documents = open_corpus(path).documents()
            assert next(documents) == "good"
            with pytest.raises(InputError, match=reason) as raised:
                next(documents)
            assert (str(raised.value.source), raised.value.row) == (str(path), 2)

    def test_broken_files(self, tmp_path: Path) -> None:
        (tmp_path / "c.parquet").write_bytes(b"not parquet")
        with pytest.raises(InputError, match="not a readable Parquet file"):
            open_corpus(tmp_path / "c.parquet")
        whole = parquet(tmp_path / "d.parquet", TEXTS).read_bytes()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        (tmp_path / "d.parquet").write_bytes(b"PAR1" + bytes(footer - 4) + whole[footer:])
        with pytest.raises(InputError, match="not a readable Parquet file"):
            open_corpus(tmp_path / "d.parquet")
        (tmp_path / "c.txt").write_bytes("Zürich".encode("latin-1"))
        with pytest.raises(InputError, match="not UTF-8"):
            open_corpus(tmp_path / "c.txt")


class TestDatasets:
    @pytest.fixture
    def datasets(self) -> Any:
        return pytest.importorskip("datasets")

    def test_a_saved_data_set(self, datasets: Any, tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"text": [*TEXTS, None], "n": [1, 2, 3, 4]})
        rows.save_to_disk(tmp_path / "saved")
        corpus = open_corpus(tmp_path / "saved")
        assert corpus.kind == "dataset"
        assert list(corpus.documents()) == TEXTS
        shutil.copytree(tmp_path / "saved", tmp_path / "copy")
        assert open_corpus(tmp_path / "copy").digest == corpus.digest
        assert list(pickle.loads(pickle.dumps(corpus)).documents()) == TEXTS

    def test_splits_of_a_saved_data_set(self, datasets: Any, tmp_path: Path) -> None:
        parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
        assert texts_of(tmp_path / "saved") == ["train"]
        test = open_corpus(f"{tmp_path}/saved:test")
        assert list(test.documents()) == ["test"]
        assert test.digest != open_corpus(tmp_path / "saved").digest
        with pytest.raises(InputError, match="no split 'dev'; splits found: train, test"):
            open_corpus(f"{tmp_path}/saved:dev")

    def test_no_text_column(self, datasets: Any, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
        with pytest.raises(InputError, match="no column 'text'; columns found: body"):
            open_corpus(tmp_path / "saved")

    def test_streaming_as_from_the_hub(self, datasets: Any, tmp_path: Path) -> None:
        # The library loads a folder of data files in the way it loads a repository of the hub.
        parquet(tmp_path / "data" / "train.parquet", TEXTS)
        parquet(tmp_path / "data" / "test.parquet", ["test"])
        names = [DatasetName(name=str(tmp_path / "data"), split=s) for s in ("train", "test")]
        train, test = (Corpus(kind="dataset", spec=str(n), dataset=n) for n in names)
        assert list(train.documents()) == TEXTS
        assert list(test.documents()) == ["test"]
        assert len(train.digest) == 64
        assert train.digest != test.digest
        other = Corpus(kind="dataset", spec="x", column="body", dataset=names[0])
        with pytest.raises(InputError, match="no column 'body'; columns found: title, text"):
            next(other.documents())

    @pytest.mark.parametrize(
        ("spec", "name"),
        [
            ("org/set", DatasetName(name="org/set")),
            ("set:en", DatasetName(name="set", config="en")),
            ("org/set:en:test", DatasetName(name="org/set", config="en", split="test")),
            ("org/set::test", DatasetName(name="org/set", split="test")),
        ],
    )
    def test_names(
        self, spec: str, name: DatasetName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        asked: list[DatasetName] = []

        def load(dataset: DatasetName, column: str) -> Any:
            asked.append(dataset)
            return iter(TEXTS)

        monkeypatch.setattr(corpora, "_dataset_texts", load)
        assert texts_of(spec) == TEXTS
        assert set(asked) == {name}

    def test_what_cannot_be_loaded_is_an_input_error(
        self, datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise ConnectionError("no way to the hub")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
        with pytest.raises(InputError, match=r"neither a path .* no way to the hub"):
            open_corpus("org/set")

    def test_without_the_library_the_remedy_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any) -> Any:
            if name == "datasets":
                raise ImportError(name)
            return real(name, *args)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(InputError, match=r"pip install 'memedit\[datasets\]'"):
            open_corpus("org/set")


class TestSample:
    def test_a_small_corpus_is_taken_whole(self) -> None:
        assert sample_documents(TEXTS, characters=1000, at_least=10, seed=0) == TEXTS

    def test_long_documents_are_shortened_before_any_is_left_out(self) -> None:
        texts = [f"{i:02}" * 500 for i in range(20)] + ["short"]
        found = sample_documents(texts, characters=2000, at_least=50, seed=0)
        assert len(found) == 21
        assert all(text.startswith(part) for text, part in zip(texts, found, strict=True))
        assert found[-1] == "short"
        assert 1000 < sum(map(len, found)) <= 2000

    def test_the_rest_is_left_out_at_random_all_over_the_stream(self) -> None:
        texts = [f"{i:04}" * 10 for i in range(1000)]
        seen = [0, 0, 0, 0]
        for seed in range(40):
            found = sample_documents(texts, characters=2000, at_least=20, seed=seed)
            assert 1900 < sum(map(len, found)) <= 2000
            assert {len(part) for part in found} == {20}
            assert found == sorted(found)
            for part in found:
                seen[int(part[:4]) // 250] += 1
        assert sum(seen) == 4000
        assert all(880 < count < 1120 for count in seen)  # 1000 ± 4.4 deviations
        same = [sample_documents(texts, characters=2000, at_least=20, seed=7) for _ in range(2)]
        assert same[0] == same[1] != found

    @pytest.mark.parametrize(("limit", "read"), [("MOST_DOCUMENTS", 100), ("MOST_CHARACTERS", 25)])
    def test_reading_ends(self, limit: str, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(corpora, limit, 100)
        stream = iter([f"{i:04}" for i in range(1000)])
        assert len(sample_documents(stream, characters=40, at_least=4, seed=0)) == 10
        assert next(stream) == f"{read:04}"


def test_self_is_a_mark() -> None:
    corpus = open_corpus("self")
    assert (corpus.kind, corpus.files, corpus.dataset) == ("self", (), None)
    assert len(corpus.digest) == 64
    with pytest.raises(InputError, match="sampled from the model"):
        corpus.documents()


def test_real_wikipedia() -> None:
    path = DATA / "wikipedia-sample.parquet"
    if not path.exists():
        pytest.skip("needs ../shared/data/wikipedia-sample.parquet")
    documents = texts_of(path)
    assert len(documents) == 96
    assert sum(map(len, documents)) > 2_000_000
