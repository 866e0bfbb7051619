"""The second moments of a job: text in, matrices on disk, one of them in memory at a time.

Knows where the text comes from, what is held out of it for the perplexity, and what is kept from
run to run. Does not know how tokens are counted (`memedit.moments`) or spread (`memedit.stages`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.artifacts import Artifacts, moment_digest
from cluster.kept_moments import KeptMoments, windows_digest
from cluster.store import open_files
from memedit.collect import collect_moments
from memedit.config import EditSettings, MomentSettings, digest_of
from memedit.cost import sampled_at_once, shape_of
from memedit.errors import InputError, MemeditError
from memedit.executor import Executor
from memedit.files import File
from memedit.model import positions_of
from memedit.moments import SecondMoment, check_moment, load_moment, windows_of
from memedit.progress import Progress
from memedit.prompts import encode
from workflows.corpora import Corpus, open_corpus, sample_documents
from workflows.session import Base
from workflows.settings import WorkJob

_HELDOUT_EVERY = 8
"""One document in so many is kept out of the statistics, for the perplexity."""
CHARACTERS_PER_TOKEN = 8
"""More than any text needs; how far into a document it is worth reading."""
# Rises when the same settings begin to sample other text.
_SAMPLING_VERSION = 2
_LEAST_WINDOW = 8
"""Tokens after the BOS; in shorter windows no token has a context worth counting."""
MIN_TOKENS_PER_WIDTH = 2
"""Fewer tokens than this for each input of the rewrite module make C singular or worthless."""


def check_window(settings: MomentSettings, base: Base) -> None:
    """Refuse windows that are too short to count, or longer than the model reads.

    Raises:
        InputError: The windows do not fit the model.
    """
    least = len(encode(base.tokenizer, "")) + _LEAST_WINDOW
    most = positions_of(base.config)
    if not least <= settings.window <= most:
        upwards = "" if math.isinf(most) else f" and at most {most}, as far as the model reads"
        raise InputError(
            f"{settings.window} tokens; a window has at least {least}{upwards}",
            field="moments.window",
        )


class Counted(Protocol):
    """What second moments are taken of."""

    @property
    def name(self) -> str:
        """As a record says it."""

    @property
    def digest(self) -> str:
        """Identity of its text."""

    def windows(self, executor: Executor, progress: Progress) -> list[list[int]]:
        """Token ids, as many as the settings ask for."""


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Where the statistics' tokens come from, and what is kept out of them.

    Raises:
        InputError: The windows do not fit the model; from its methods: the corpus is too small.
    """

    corpus: Corpus
    base: Base
    settings: MomentSettings
    heldout_tokens: int
    artifacts: Artifacts

    def __post_init__(self) -> None:
        check_window(self.settings, self.base)

    @property
    def name(self) -> str:
        """See `Counted`."""
        return self.corpus.spec

    @property
    def digest(self) -> str:
        """Identity of the text; of sampled text, that of what it is sampled from."""
        if self.corpus.kind == "self":
            return digest_of(
                "self",
                _SAMPLING_VERSION,
                self.base.checkpoint.digest,
                self.settings.seed,
                torch.device(self.base.device).type,
                self.base.job.dtype,
            )
        return self.corpus.digest

    def windows(self, executor: Executor, progress: Progress) -> list[list[int]]:
        """Windows of token ids to count, at least `settings.tokens` where the corpus has them."""
        if self.corpus.kind == "self":
            windows = self._sampled(executor, progress)
        else:
            windows = self._cut(self._texts[0], self.settings.tokens)
        needed = MIN_TOKENS_PER_WIDTH * self.base.arch.input_width(self.base.config)
        found = sum(map(len, windows))
        if found < needed:
            raise InputError(
                f"too small for the statistics: {found} tokens, and this model's keys need at "
                f"least {needed}; give more text, or let moments.tokens be larger",
                source=self.corpus.spec,
                field="corpus",
            )
        return windows

    def texts(self, executor: Executor, progress: Progress) -> list[str]:
        """The text that is counted, to be read."""
        if self.corpus.kind != "self":
            return self._texts[0]
        windows = self._sampled(executor, progress)
        texts: list[str] = self.base.tokenizer.batch_decode(windows, skip_special_tokens=True)
        return texts

    def _sampled(self, executor: Executor, progress: Progress) -> list[list[int]]:
        """Windows to count that the model itself has said; they are kept."""
        digest = digest_of("counted", self.digest, self.settings.window, self.settings.tokens)
        known = self.artifacts.windows(digest)
        if known is not None:
            return known
        progress.message(f"Sampling {self.settings.tokens} tokens from the model (corpus self)")
        rows = math.ceil(self.settings.tokens / self.settings.window)
        windows = self._sample(executor, rows, progress, heldout=False)
        self.artifacts.keep_windows(digest, windows)
        return windows

    def heldout(self, executor: Executor, progress: Progress) -> list[list[int]]:
        """Windows that are not counted, to measure the perplexity on."""
        if not self.heldout_tokens:
            return []
        if self.corpus.kind != "self":
            return self._cut(self._texts[1], self.heldout_tokens)
        digest = digest_of("heldout", self.digest, self.settings.window, self.heldout_tokens)
        known = self.artifacts.windows(digest)
        if known is not None:
            return known
        rows = math.ceil(self.heldout_tokens / self.settings.window)
        windows = self._sample(executor, rows, progress, heldout=True)
        self.artifacts.keep_windows(digest, windows)
        return windows

    def _sample(
        self, executor: Executor, rows: int, progress: Progress, *, heldout: bool
    ) -> list[list[int]]:
        # Held-out text takes the even seeds and counted text the odd ones: they never meet.
        shape = shape_of(self.base.config, self.base.arch)
        count = math.ceil(rows / sampled_at_once(shape, window=self.settings.window))
        units = []
        for i in range(count):
            size = rows * (i + 1) // count - rows * i // count
            seed = (self.settings.seed << 20) + 2 * i + (not heldout)
            units.append((size, self.settings.window, seed))
        parts: dict[int, list[list[int]]] = {}
        progress.start("stats", total=rows, unit="windows")
        for i, windows in executor.map("sample", units):
            parts[i] = windows
            progress.advance("stats", len(windows))
        progress.finish("stats")
        return [window for i in range(len(units)) for window in parts[i]]

    @cached_property
    def _texts(self) -> tuple[list[str], list[str]]:
        """A sample of the corpus in two parts: text to count, and text that is held out.

        Both may depend on nothing but the settings of the moments, whose digest stands for the
        windows that were counted.
        """
        window = self.settings.window
        tokens = max(self.settings.tokens, 2 * _HELDOUT_EVERY * window)
        texts = sample_documents(
            self.corpus.documents(),
            characters=2 * tokens * CHARACTERS_PER_TOKEN,
            at_least=window * CHARACTERS_PER_TOKEN,
            seed=self.settings.seed,
        )
        if len(texts) == 1:
            end = len(texts[0]) - len(texts[0]) // _HELDOUT_EVERY
            return [texts[0][:end]], [texts[0][end:]]
        every = min(_HELDOUT_EVERY, len(texts))
        counted = [text for i, text in enumerate(texts, start=1) if i % every]
        return counted, texts[every - 1 :: every]

    def _cut(self, texts: Sequence[str], tokens: int) -> list[list[int]]:
        tokenizer = self.base.tokenizer
        bos = encode(tokenizer, "")
        documents = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        window = self.settings.window - len(bos)
        end = tokenizer.eos_token_id
        cut = windows_of(
            documents,
            window=window,
            tokens=tokens,
            seed=self.settings.seed,
            separator=tokenizer.bos_token_id if end is None else end,
        )
        # Each window begins as a text does: the model never saw a first position without its BOS.
        return [[*bos, *ids] for ids in cut]


@dataclass(frozen=True, kw_only=True)
class StoredMoments(Mapping[int, SecondMoment]):
    """Second moments by layer, read from disk one at a time: five of a 20B model take 24 GB."""

    digests: Mapping[int, str]
    read: Callable[[int], SecondMoment]
    corpus: Mapping[str, str]
    """Name and digest of the text that was counted."""
    settings: Mapping[str, Any]
    """Those of `MomentSettings` that it was counted with."""

    def __getitem__(self, layer: int) -> SecondMoment:
        if layer not in self.digests:
            raise KeyError(layer)
        return self.read(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.digests)

    def __len__(self) -> int:
        return len(self.digests)


def moments_for(
    source: Counted,
    *,
    base: Base,
    settings: EditSettings,
    executor: Executor,
    artifacts: Artifacts,
    progress: Progress,
) -> StoredMoments:
    """The second moments of the edited layers; counted now where they were not kept."""
    digests = {
        layer: moment_digest(
            model=base.checkpoint.digest,
            corpus=source.digest,
            settings=settings.moments,
            layer=layer,
            weight_name=base.arch.weight_name(layer),
            layers=settings.layers,
            dtype=base.job.dtype,
        )
        for layer in settings.layers
    }

    def read(layer: int) -> SecondMoment:
        moment = artifacts.moment(digests[layer])
        if moment is None:
            artifacts.forget_moment(digests[layer])  # or it would seem to be there again
            raise MemeditError(
                f"the second moment of layer {layer} has gone from {artifacts.location} while this "
                "run needed it, or was damaged; run the same command again"
            )
        return moment

    stored = StoredMoments(
        digests=digests,
        read=read,
        corpus={"name": source.name, "digest": source.digest},
        settings=asdict(settings.moments),
    )

    def missing() -> tuple[int, ...]:
        """The layers to count: all that stop together, or those that were not kept."""
        found = tuple(i for i in settings.layers if not artifacts.has_moment(digests[i]))
        return settings.layers if found and settings.moments.tolerance > 0 else found

    layers = missing()
    if not layers:
        progress.start("stats", total=len(digests), unit="layers")
        progress.advance("stats", len(digests))
        progress.finish("stats")
        return stored
    windows = source.windows(executor, progress)
    counted = {layer: digests[layer] for layer in layers}
    unfinished = KeptMoments(artifacts, digest_of(counted, windows_digest(windows)))
    with unfinished.held() as kept:
        if not missing():  # by the run that held it before
            return stored
        for moment in collect_moments(
            executor,
            windows,
            layers=layers,
            settings=settings.moments,
            progress=progress,
            kept=kept,
        ):
            artifacts.keep_moment(digests[moment.layer], moment)
    return stored


def corpus_of(job: WorkJob) -> Corpus:
    """The job's corpus, opened and checked."""
    return replace(open_corpus(job.corpus), checksums=job.cache_folder)


STATS_NAME = "stats.json"


def load_stats(
    location: str, base: Base, settings: EditSettings, artifacts: Artifacts
) -> StoredMoments:
    """The second moments that `memedit stats` wrote, checked; far ones are fetched once.

    Raises:
        InputError: They belong to another model, lack a layer, or are damaged.
    """
    files = open_files(location)
    path = File(files, STATS_NAME)
    if files.size(STATS_NAME) is None:
        wrong = f"holds no {STATS_NAME}" if files.sizes() else "no such folder"
        raise InputError(wrong, source=location, field="stats")
    try:
        stats = json.loads(path.read())
        model, digests = stats["model"]["digest"], stats["moments"]
        corpus, counted = dict(stats["corpus"]), dict(stats["settings"])
        # Each becomes the name of a file in the cache.
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests.values()):
            raise ValueError("no digest")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("not what `memedit stats` writes", source=path) from error
    if model != base.checkpoint.digest:
        raise InputError(
            f"these are the statistics of another model ({stats['model']['name']}, "
            f"{model[:12]}…; this is {base.checkpoint.digest[:12]}…)",
            source=path,
            field="model",
        )
    missing = [layer for layer in settings.layers if str(layer) not in digests]
    if missing:
        raise InputError(
            f"no statistics of layers {', '.join(map(str, missing))}", source=path, field="layers"
        )
    paths: dict[int, Path] = {}
    for layer in settings.layers:
        file = File(files, moments_name(layer))
        paths[layer] = artifacts.fetched_moment(digests[str(layer)], file)
        try:
            if check_moment(paths[layer]).get("digest") != digests[str(layer)]:
                raise InputError(f"not the file that {STATS_NAME} lists")
        except InputError as error:
            if files.here is None:  # nobody shall find it in the cache
                paths[layer].unlink(missing_ok=True)
            raise InputError(error.message, source=file) from error
    return StoredMoments(
        digests={layer: digests[str(layer)] for layer in settings.layers},
        read=lambda layer: load_moment(paths[layer]),
        corpus=corpus,
        settings=counted,
    )


def moments_name(layer: int) -> str:
    """The file into which `memedit stats` puts the second moment of a layer."""
    return f"layer-{layer}.safetensors"
