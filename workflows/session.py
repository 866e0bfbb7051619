"""What every run over a model begins with: the checkpoint, its settings, its workers, its facts.

Knows how jobs name things; the work itself is in `memedit.stages`. Second moments are in
`workflows.moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cluster.dispatch import Rules
from cluster.executors import open_executor
from memedit.architecture import Architecture, architecture_of
from memedit.checkpoint import Checkpoint
from memedit.config import ONE_LAYER, EditSettings
from memedit.defaults import Defaults, defaults_for
from memedit.errors import InputError
from memedit.executor import Executor
from memedit.files import Files
from memedit.model import ModelSpec, load_config, load_tokenizer, positions_of
from memedit.progress import Progress
from memedit.prompts import (
    BARE,
    FIXED_CONTEXTS,
    EncodedRequest,
    check_prompts,
    encode,
    encode_request,
    readable,
)
from memedit.requests import EditRequest
from memedit.stages import once
from memedit.targets import default_tokens_per_batch
from workflows.facts import FactTable, Reject
from workflows.models import resolve_model
from workflows.origin import doubt_of, origin_of
from workflows.settings import MethodJob, ModelJob, PlanJob, SpreadJob, WorkJob

T = TypeVar("T")


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

    @property
    def positions(self) -> float:
        """How far the model reads, in tokens."""
        return positions_of(self.config)

    def identity(self) -> str | None:
        """The checkpoint's digest; None where a plan would have to fetch the weights for it."""
        files = self.checkpoint.files
        if isinstance(self.job, PlanJob) and files.here is None:
            return None
        there = all(files.size(shard) is not None for shard in self.checkpoint.shards)
        return self.checkpoint.digest if there else None

    def spec(
        self,
        *,
        files: Files | None = None,
        until_layer: int | None = None,
        published: Mapping[str, str] | None = None,
    ) -> ModelSpec:
        """What a worker loads: the base, or another checkpoint of the same kind."""
        return ModelSpec(
            files=files or self.checkpoint.files,
            device=self.device,
            dtype=self.job.dtype,
            gpus=gpus_of_job(self.job),
            until_layer=until_layer,
            overrides=dict(self.job.architecture),
            published=published or {},
        )


def device_of_job(job: ModelJob) -> str:
    """`auto` is a GPU where there is one; on Ray, where the workers ask for one.

    Raises:
        InputError: There is no such device, or workers ask for GPUs that are not to be used.
    """
    on_ray = isinstance(job, SpreadJob) and job.executor == "ray"
    if job.device == "auto":
        if isinstance(job, SpreadJob) and on_ray:
            return "cuda" if job.gpus_per_worker else "cpu"
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(job.device).type
    except RuntimeError as error:
        wanted = "write cpu, cuda, cuda:1 or auto"
        raise InputError(f"no device {job.device!r}; {wanted}", field="device") from error
    if isinstance(job, SpreadJob) and on_ray and kind == "cpu" and job.gpus_per_worker:
        raise InputError(
            "computes on the CPU while the workers ask for GPUs; set one of the two",
            field="gpus_per_worker",
        )
    if kind == "cuda" and not on_ray and not torch.cuda.is_available():
        raise InputError("torch finds no GPU here; write cpu or auto", field="device")
    return job.device


def gpus_of_job(job: ModelJob) -> int:
    """Over how many GPUs one worker spreads the model."""
    return max(1, int(job.gpus_per_worker)) if isinstance(job, SpreadJob) else 1


def open_base(job: ModelJob, progress: Progress) -> Base:
    """Resolve the model's name and check its checkpoint and family.

    Raises:
        InputError: There is no such model, its files are damaged, or its family cannot be edited.
    """
    resolved = resolve_model(job.model, cache=job.cache_folder, progress=progress)
    checkpoint = Checkpoint.open(resolved.files, cache=job.cache_folder)
    config = load_config(resolved.files)
    return Base(
        name=resolved.name,
        checkpoint=checkpoint,
        config=config,
        arch=architecture_of(config, job.architecture),
        tokenizer=load_tokenizer(resolved.files),
        job=job,
    )


def settings_of(job: WorkJob, base: Base, n_facts: int, progress: Progress) -> EditSettings:
    """The family's defaults under what the job sets, checked against the model."""
    defaults = _defaults_of(job, base, n_facts)
    settings = job.settings(defaults.settings)
    if settings.method in ONE_LAYER and len(settings.layers) != 1:
        raise InputError(f"{settings.method} edits one layer", field="layers")
    if settings.method == "ft" and job.dtype != "float32":
        raise InputError("fine-tuning computes in float32, where small steps add up", field="dtype")
    if doubt := doubt_of(job, defaults, base.identity, base.name, n_facts):
        progress.message(doubt)
    batch = settings.targets.tokens_per_batch
    batch = batch or default_tokens_per_batch(torch.device(base.device))
    return replace(
        settings,
        layers=base.arch.check_layers(settings.layers),
        targets=replace(settings.targets, tokens_per_batch=batch),
    )


def settings_origin(job: WorkJob, base: Base, n_facts: int) -> str:
    """Where the settings come from, for the record: published, tuned here, or guessed."""
    return origin_of(job, _defaults_of(job, base, n_facts), base.identity)


def _defaults_of(job: WorkJob, base: Base, n_facts: int) -> Defaults:
    """The settings of the model and the job's method."""
    method = job.method if isinstance(job, MethodJob) else "memit"
    return defaults_for(base.config, n_facts, method=method)


def open_workers(job: SpreadJob, spec: ModelSpec, progress: Progress) -> Executor:
    """Start the workers that the job asks for; what goes wrong and is mended is told."""
    return open_executor(
        job.executor,
        spec,
        address=job.address,
        workers=job.workers,
        gpus_per_worker=job.gpus_per_worker,
        rules=Rules(attempts=job.attempts, stall_s=job.stall_timeout_s),
        progress=progress,
    )


def encode_facts(
    table: FactTable,
    base: Base,
    contexts: Sequence[str],
    *,
    on_bad_row: Literal["fail", "skip"],
    refuse: Callable[[Sequence[Reject]], None] | None = None,
) -> tuple[FactTable, list[EncodedRequest]]:
    """Token ids of all facts in canonical order; what cannot be placed or is too long is rejected.

    Args:
        table: The facts.
        base: The model, whose tokenizer and length decide.
        contexts: See `contexts_of`.
        on_bad_row: Whether a rejected fact ends it.
        refuse: Told of rejected facts; may raise.

    Raises:
        InputError: A fact was rejected and `on_bad_row` is "fail", or none is left.
    """

    def encoded(request: EditRequest) -> EncodedRequest:
        return encode_fact(request, base, contexts)

    table, found = sift(table, encoded, on_bad_row=on_bad_row, refuse=refuse)
    return replace(table, requests=tuple(one.request for one in found)), found


def encode_fact(request: EditRequest, base: Base, contexts: Sequence[str]) -> EncodedRequest:
    """Token ids of one fact.

    Raises:
        InputError: It cannot be placed, or a text is longer than the model reads.
    """
    positions = positions_of(base.config)
    request = readable(base.tokenizer, request, positions)
    one = encode_request(base.tokenizer, request, contexts)
    _check_length(one, positions)
    check_prompts(base.tokenizer, request, positions)
    return one


def sift(
    table: FactTable,
    read: Callable[[EditRequest], T],
    *,
    on_bad_row: Literal["fail", "skip"],
    refuse: Callable[[Sequence[Reject]], None] | None = None,
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
    if refuse is not None and table.rejects:
        refuse(table.rejects)
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
