"""The text behind the statistics: corpora of every shape, what is held out, and identities."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.artifacts import Artifacts
from memedit.architecture import architecture_of
from memedit.checkpoint import Checkpoint
from memedit.config import MomentSettings
from memedit.errors import InputError
from memedit.executor import Executor
from memedit.progress import Progress, Silent
from tests.tiny import EOS_ID, POSITIONS, tiny_config, tiny_tokenizer
from workflows.corpora import Corpus, open_corpus
from workflows.moments import TokenSource
from workflows.session import Base
from workflows.settings import StatsJob

WINDOW = 32
WORDS = ("The", "capital", "of", "France", "is", "Paris", "and", "the", "tower", "stands")


class SomeCheckpoint:
    digest = "0" * 64


class Sampler:
    """Stands for workers that sample: the seed is all that a window holds."""

    def map(self, method: str, units: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        assert method == "sample"
        for i, (rows, length, seed) in reversed(list(enumerate(units))):
            yield i, [[seed] * length for _ in range(rows)]


class Told(Silent):
    """Keeps what it is told of."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        self.heard.append(("start", stage, total, unit))

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        self.heard.append(("advance", stage, done))

    def finish(self, stage: str) -> None:
        self.heard.append(("finish", stage))


def base_of(*, bos: bool = False, model: str = "llama", **job: Any) -> Base:
    config = tiny_config(model)
    return Base(
        name="tiny",
        checkpoint=cast(Checkpoint, SomeCheckpoint()),
        config=config,
        arch=architecture_of(config),
        tokenizer=tiny_tokenizer(bos=bos),
        job=StatsJob(model="tiny", out=Path("out"), **{"device": "cpu"} | job),
    )


def source_of(
    corpus: Corpus, folder: Path, *, base: Base | None = None, **settings: Any
) -> TokenSource:
    return TokenSource(
        corpus=corpus,
        base=base or base_of(),
        settings=MomentSettings(**{"tokens": 1500, "window": WINDOW} | settings),
        heldout_tokens=200,
        artifacts=Artifacts(folder / "cache"),
    )


def documents(folder: Path, texts: Sequence[str]) -> Corpus:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_corpus(path)


def text_of(name: str, words: int) -> str:
    """A text that says its name with every other word."""
    return " ".join(f"{name} {WORDS[i % len(WORDS)]}" for i in range(words))


def split(source: TokenSource) -> tuple[list[list[int]], list[list[int]]]:
    executor = cast(Executor, None)  # a corpus that is read needs none
    return source.windows(executor, Silent()), source.heldout(executor, Silent())


def names(source: TokenSource, windows: list[list[int]]) -> set[str]:
    said = " ".join(source.base.tokenizer.batch_decode(windows)).replace("</s>", " ")
    return {word for word in said.split() if re.fullmatch(r"#\d+#", word)}


def test_many_short_documents_fill_windows(tmp_path: Path) -> None:
    base = base_of()
    texts = [text_of(f"#{i}#", 4) for i in range(5000)]
    lengths = [len(base.tokenizer(text)["input_ids"]) for text in texts[:100]]
    assert max(lengths) < WINDOW
    source = source_of(documents(tmp_path, texts), tmp_path, window=64)
    counted, heldout = split(source)
    assert all(len(window) == 64 for window in counted)
    assert 1500 <= sum(map(len, counted)) < 1500 + 64
    assert sum(map(len, heldout)) >= 200
    assert any(EOS_ID in window for window in counted)
    places = sorted(int(name.strip("#")) for name in names(source, counted))
    assert places[0] < 1000 and places[-1] > 4000  # all over the corpus, not its head
    assert not names(source, counted) & names(source, heldout)
    again = source_of(documents(tmp_path, texts), tmp_path, window=64)
    assert split(again) == (counted, heldout)
    other = source_of(documents(tmp_path, texts), tmp_path, window=64, seed=1)
    assert split(other) != (counted, heldout)


def test_one_long_document_holds_out_its_end(tmp_path: Path) -> None:
    text = " ".join(f"#{i}#" for i in range(1500))
    source = source_of(documents(tmp_path, [text]), tmp_path)
    counted, heldout = split(source)
    assert sum(map(len, counted)) >= 1500
    assert sum(map(len, heldout)) >= 200
    whole = {f"#{i}#" for i in range(1500)}
    last_counted = max(int(n.strip("#")) for n in names(source, counted) & whole)
    first_heldout = min(int(n.strip("#")) for n in names(source, heldout) & whole)
    assert last_counted < first_heldout


def test_long_documents_all_take_part(tmp_path: Path) -> None:
    source = source_of(
        documents(tmp_path, [text_of(f"#{i}#", 500) for i in range(96)]), tmp_path, tokens=84 * 32
    )
    counted, heldout = split(source)
    assert names(source, counted) == {f"#{i}#" for i in range(96) if i % 8 != 7}
    assert names(source, heldout) <= {f"#{i}#" for i in range(7, 96, 8)}
    assert all(len(window) == WINDOW for window in counted + heldout)


@pytest.mark.parametrize("count", [2, 5, 7])
def test_of_few_documents_the_last_is_held_out(tmp_path: Path, count: int) -> None:
    texts = [text_of(f"#{i}#", 100) for i in range(count)]
    source = source_of(documents(tmp_path, texts), tmp_path)
    counted, heldout = split(source)
    assert names(source, counted) == {f"#{i}#" for i in range(count - 1)}
    assert names(source, heldout) == {f"#{count - 1}#"}
    assert sum(map(len, heldout)) >= 200


def test_every_window_begins_as_a_text_does(tmp_path: Path) -> None:
    corpus = documents(tmp_path, [text_of(f"#{i}#", 4) for i in range(400)])
    counted, heldout = split(source_of(corpus, tmp_path, base=base_of(bos=True)))
    start = base_of(bos=True).tokenizer.bos_token_id
    assert {window[0] for window in counted + heldout} == {start}
    assert max(map(len, counted + heldout)) == WINDOW


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    source = source_of(documents(tmp_path, ["One short text.", "Another."]), tmp_path)
    with pytest.raises(InputError, match="too small for the statistics"):
        split(source)


@pytest.mark.parametrize(
    ("model", "bos", "window", "good"),
    [
        *[("llama", False, window, good) for window, good in ((7, False), (8, True))],
        *[("llama", True, window, good) for window, good in ((8, False), (9, True))],
        *[("gpt2", False, POSITIONS + n, n == 0) for n in (0, 1)],
        ("bloom", False, 100_000, True),  # has no last position
    ],
)
def test_the_window_fits_the_model(
    tmp_path: Path, model: str, bos: bool, window: int, good: bool
) -> None:
    def make() -> TokenSource:
        base = base_of(model=model, bos=bos)
        return source_of(open_corpus("self"), tmp_path, base=base, window=window)

    if good:
        assert make().settings.window == window
        return
    with pytest.raises(InputError) as raised:
        make()
    assert raised.value.field == "moments.window"


def test_the_digest_of_sampled_text_follows_what_it_is_sampled_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus("self")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    bases = [
        base_of(dtype="float32"),
        base_of(dtype="bfloat16"),
        base_of(dtype="float32", device="cuda"),
    ]
    digests = [source_of(corpus, tmp_path, base=base).digest for base in bases]
    digests.append(source_of(corpus, tmp_path, base=bases[0], seed=1).digest)
    assert len(set(digests)) == 4
    other_card = base_of(dtype="float32", device="cuda:1")
    assert source_of(corpus, tmp_path, base=other_card).digest == digests[2]


def test_sampling_is_a_stage_that_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.moments.sampled_at_once", lambda shape, window: 160)
    source = source_of(open_corpus("self"), tmp_path, tokens=200 * WINDOW)
    told = Told()
    executor = cast(Executor, Sampler())
    counted = source.windows(executor, cast(Progress, told))
    assert told.heard == [
        ("start", "stats", 200, "windows"),
        ("advance", "stats", 100),
        ("advance", "stats", 100),
        ("finish", "stats"),
    ]
    assert [window[0] for window in counted] == [1] * 100 + [3] * 100  # in the order of the units
    told.heard.clear()
    heldout = source.heldout(executor, cast(Progress, told))
    assert told.heard[0] == ("start", "stats", 7, "windows") and told.heard[-1][0] == "finish"
    assert not {window[0] for window in heldout} & {window[0] for window in counted}
    told.heard.clear()
    assert source.heldout(executor, cast(Progress, told)) == heldout
    assert told.heard == []  # kept
