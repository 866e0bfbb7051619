"""What every run over a model begins with: the checkpoint, its settings, its workers, its corpus.

Knows how jobs name things; the work itself is in `memedit.stages`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cluster.artifacts import Artifacts, moment_digest
from cluster.executors import open_executor
from memedit.architecture import Architecture, architecture_of
from memedit.checkpoint import Checkpoint
from memedit.config import EditSettings, MomentSettings, digest_of
from memedit.cost import sampled_at_once, shape_of
from memedit.defaults import defaults_for
from memedit.errors import InputError, MemeditError
from memedit.executor import Executor
from memedit.model import ModelSpec, load_config, load_tokenizer, positions_of
from memedit.moments import SecondMoment, check_moment, load_moment, windows_of
from memedit.progress import Progress
from memedit.prompts import (
    BARE,
    FIXED_CONTEXTS,
    EncodedRequest,
    check_prompts,
    encode,
    encode_request,
)
from memedit.requests import EditRequest
from memedit.stages import collect_moments, once
from memedit.targets import default_tokens_per_batch
from workflows.corpora import Corpus, open_corpus, sample_documents
from workflows.facts import FactTable
from workflows.models import resolve_model
from workflows.settings import ModelJob, WorkJob

T = TypeVar("T")

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


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base checkpoint that was found sound, with its tokenizer; no weight is loaded yet."""

    name: str
    checkpoint: Checkpoint
    config: PretrainedConfig
    arch: Architecture
    tokenizer: PreTrainedTokenizerBase
    job: ModelJob

    @property
    def device(self) -> str:
        """Where to compute."""
        return device_of_job(self.job)

    def spec(self, *, folder: Path | None = None, until_layer: int | None = None) -> ModelSpec:
        """What a worker loads: the base, or another checkpoint of the same kind."""
        return ModelSpec(
            folder=folder or self.checkpoint.folder,
            device=self.device,
            dtype=self.job.dtype,
            until_layer=until_layer,
            overrides=dict(self.job.architecture),
        )


def device_of_job(job: ModelJob) -> str:
    """`auto` is a GPU where there is one; on Ray, where the workers ask for one.

    Raises:
        InputError: There is no such device, or workers ask for GPUs that are not to be used.
    """
    on_ray = isinstance(job, WorkJob) and job.executor == "ray"
    if job.device == "auto":
        if isinstance(job, WorkJob) and on_ray:
            return "cuda" if job.gpus_per_worker else "cpu"
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(job.device).type
    except RuntimeError as error:
        wanted = "write cpu, cuda, cuda:1 or auto"
        raise InputError(f"no device {job.device!r}; {wanted}", field="device") from error
    if isinstance(job, WorkJob) and on_ray and kind == "cpu" and job.gpus_per_worker:
        raise InputError(
            "computes on the CPU while the workers ask for GPUs; set one of the two",
            field="gpus_per_worker",
        )
    if kind == "cuda" and not on_ray and not torch.cuda.is_available():
        raise InputError("torch finds no GPU here; write cpu or auto", field="device")
    return job.device


def open_base(job: ModelJob, progress: Progress) -> Base:
    """Resolve the model's name and check its checkpoint and family.

    Raises:
        InputError: There is no such model, its files are damaged, or its family cannot be edited.
    """
    resolved = resolve_model(job.model, cache=job.cache_folder, progress=progress)
    checkpoint = Checkpoint.open(resolved.folder, cache=job.cache_folder)
    config = load_config(resolved.folder)
    return Base(
        name=resolved.name,
        checkpoint=checkpoint,
        config=config,
        arch=architecture_of(config, job.architecture),
        tokenizer=load_tokenizer(resolved.folder),
        job=job,
    )


def settings_of(job: WorkJob, base: Base, n_facts: int, progress: Progress) -> EditSettings:
    """The family's defaults under what the job sets, checked against the model."""
    defaults = defaults_for(base.config, n_facts)
    settings = job.settings(defaults.settings)
    if not defaults.known:
        progress.message(f"{base.name}: {defaults.source}; look at the report before you trust it")
    batch = settings.targets.tokens_per_batch
    batch = batch or default_tokens_per_batch(torch.device(base.device))
    return replace(
        settings,
        layers=base.arch.check_layers(settings.layers),
        targets=replace(settings.targets, tokens_per_batch=batch),
    )


def open_workers(job: WorkJob, spec: ModelSpec) -> Executor:
    """Start the workers that the job asks for."""
    return open_executor(
        job.executor,
        spec,
        address=job.address,
        workers=job.workers,
        gpus_per_worker=job.gpus_per_worker,
    )


def encode_facts(
    table: FactTable,
    base: Base,
    contexts: Sequence[str],
    *,
    on_bad_row: Literal["fail", "skip"],
) -> tuple[FactTable, list[EncodedRequest]]:
    """Token ids of all facts in canonical order; what cannot be placed or is too long is rejected.

    Raises:
        InputError: A fact was rejected and `on_bad_row` is "fail", or none is left.
    """
    positions = positions_of(base.config)

    def encoded(request: EditRequest) -> EncodedRequest:
        one = encode_request(base.tokenizer, request, contexts)
        _check_length(one, positions)
        check_prompts(base.tokenizer, request, positions)
        return one

    return sift(table, encoded, on_bad_row=on_bad_row)


def sift(
    table: FactTable, read: Callable[[EditRequest], T], *, on_bad_row: Literal["fail", "skip"]
) -> tuple[FactTable, list[T]]:
    """What `read` makes of each fact, in canonical order; a fact that it refuses is rejected.

    Raises:
        InputError: A fact was rejected and `on_bad_row` is "fail", or none is left.
    """
    found: list[T] = []
    for request in table.batch:
        try:
            found.append(read(request))
        except InputError as error:
            table = table.reject(request.case_id, error.message, field=error.field)
    if on_bad_row == "fail":
        table.require_no_rejects()
    table.require_requests()
    return table, found


def _check_length(encoded: EncodedRequest, positions: float) -> None:
    longest = max(len(text.ids) for text in encoded.contexts) + len(encoded.target_ids)
    longest = max(longest, len(encoded.kl.ids))
    if longest > positions:
        raise InputError(
            f"{longest} tokens with its context and target; the model reads {positions}",
            field="prompt",
        )


def contexts_of(settings: EditSettings, base: Base, executor: Executor | None) -> tuple[str, ...]:
    """The context templates of a run, the bare prompt first.

    Raises:
        InputError: A template has not exactly one `{}`, or sampled ones are longer than the model
            reads.
    """
    chosen = settings.contexts
    if chosen.kind == "none":
        return (BARE,)
    if chosen.kind == "fixed":
        templates = chosen.templates or FIXED_CONTEXTS
        for template in templates:
            if template.count("{}") != 1:
                raise InputError(
                    f"{template!r} has not exactly one {{}}, which stands for the prompt",
                    field="contexts.templates",
                )
        return (BARE, *templates)
    longest = max(len(encode(base.tokenizer, start)) for start in chosen.starts)
    if longest + chosen.sampled_tokens > positions_of(base.config):
        raise InputError(
            f"{chosen.sampled_tokens}; the model reads {positions_of(base.config)} tokens",
            field="contexts.sampled_tokens",
        )
    if executor is None:
        return (BARE,)  # enough to check the facts before a model is loaded
    templates = once(executor, "contexts", chosen.starts, chosen.sampled_tokens, chosen.seed)
    return (BARE, *templates)


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
            rows = math.ceil(self.settings.tokens / self.settings.window)
            progress.message(f"Sampling {self.settings.tokens} tokens from the model (corpus self)")
            windows = self._sample(executor, rows, progress, heldout=False)
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
    source: TokenSource,
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
            raise MemeditError(
                f"the second moment of layer {layer} has gone from {artifacts.folder} while this "
                "run needed it; run the same command again"
            )
        return moment

    stored = StoredMoments(
        digests=digests,
        read=read,
        corpus={"name": source.corpus.spec, "digest": source.digest},
        settings=asdict(settings.moments),
    )
    if all(map(artifacts.has_moment, digests.values())):
        progress.start("stats", total=len(digests), unit="layers")
        progress.advance("stats", len(digests))
        progress.finish("stats")
        return stored
    moments = collect_moments(
        executor,
        source.windows(executor, progress),
        layers=settings.layers,
        settings=settings.moments,
        progress=progress,
    )
    for layer, moment in moments.items():
        artifacts.keep_moment(digests[layer], moment)
    return stored


def corpus_of(job: WorkJob) -> Corpus:
    """The job's corpus, opened and checked."""
    return replace(open_corpus(job.corpus), checksums=job.cache_folder)


STATS_NAME = "stats.json"


def load_stats(folder: Path, base: Base, settings: EditSettings) -> StoredMoments:
    """The second moments that `memedit stats` wrote, checked.

    Raises:
        InputError: They belong to another model, lack a layer, or are damaged.
    """
    path = folder / STATS_NAME
    try:
        stats = json.loads(path.read_text())
        model, digests = stats["model"]["digest"], stats["moments"]
        corpus, counted = dict(stats["corpus"]), dict(stats["settings"])
    except FileNotFoundError as error:
        wrong = f"holds no {STATS_NAME}" if folder.is_dir() else "no such folder"
        raise InputError(wrong, source=folder, field="stats") from error
    except (ValueError, TypeError, KeyError) as error:
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
    for layer in settings.layers:
        metadata = check_moment(moments_path(folder, layer))
        if metadata.get("digest") != digests[str(layer)]:
            raise InputError(
                f"not the file that {STATS_NAME} lists", source=moments_path(folder, layer)
            )
    return StoredMoments(
        digests={layer: digests[str(layer)] for layer in settings.layers},
        read=lambda layer: load_moment(moments_path(folder, layer)),
        corpus=corpus,
        settings=counted,
    )


def moments_path(folder: Path, layer: int) -> Path:
    """Where `memedit stats` puts the second moment of a layer."""
    return folder / f"layer-{layer}.safetensors"
