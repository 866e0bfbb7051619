"""`memedit plan`: what `edit` would do with these facts and this model, without doing it.

Reads the facts, the config, the tokenizer and, in search of NaN, every weight once; where these are
not here yet, config.json and the index are enough. Loads no model. The arithmetic is in
`memedit.cost`; here it meets files, the settings of a job and the measured rate of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from memedit.architecture import architecture_of
from memedit.checkpoint import Checkpoint
from memedit.config import ONE_LAYER, EditSettings
from memedit.cost import (
    Amount,
    ModelShape,
    TextCounts,
    count_texts,
    evaluation_work,
    keys_work,
    sampling_work,
    shape_of,
    si,
    solve_work,
    statistics_work,
    targets_work,
)
from memedit.errors import InputError
from memedit.evaluate import GENERATION_EXTRA_TOKENS, questions
from memedit.free_text import consistency_sample
from memedit.model import DTYPES, load_config, load_tokenizer
from memedit.progress import Progress
from memedit.prompts import encode, encode_completion
from memedit.protection import neighbours_of
from memedit.requests import EditRequest
from memedit.scoring import plan_rows
from memedit.targets import default_tokens_per_batch
from workflows.corpora import Corpus
from workflows.facts import FactTable, read_facts
from workflows.models import resolve_model
from workflows.moments import MIN_TOKENS_PER_WIDTH, check_window, corpus_of
from workflows.outline import index_without_weights, outline
from workflows.plan_memory import memory_of, workers_of
from workflows.progress import duration
from workflows.rate import measured_rate
from workflows.schedule import REPAIRED, cuts, moved, schedule
from workflows.session import (
    Base,
    contexts_of,
    device_of_job,
    encode_facts,
    settings_of,
    settings_origin,
)
from workflows.settings import PlanJob
from workflows.wording import layers_text, plural

EFFICIENCY: Mapping[str, float] = {
    "sampling": 0.3,
    "statistics": 0.65,
    "protection": 0.4,
    "evaluation": 0.4,
    "targets": 0.65,
    "keys": 0.4,
    "solve": 0.5,
    "repair": 0.65,
}
"""The share of the matrix rate that a stage reaches: measured with SmolLM2 135M on a CPU, but for
`protection`, whose short rows are taken to do as well as those of the evaluation."""
FILE_BYTES_PER_S = 1e9
"""Taken for reading, checksums and writing."""
_JUDGED_FACTS = 64
"""So many facts are tokenised to know what their evaluation costs."""


def run_plan(job: PlanJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit plan`; gives plain values, amounts with the arithmetic behind them.

    Args:
        job: The job.
        progress: Told of what a person should read.

    Raises:
        InputError: The input or the settings are wrong, as `edit` would say it.
    """
    if job.method in ONE_LAYER:
        raise InputError(
            f"what {job.method} takes is not planned; it is there to be compared with",
            field="method",
        )
    table = read_facts(job.facts, on_bad_row=job.on_bad_row)
    base, absent = _open_base(job, progress)
    settings = settings_of(job, base, len(table.requests), progress)
    contexts = _contexts(settings, base)
    table, encoded = encode_facts(table, base, contexts, on_bad_row=job.on_bad_row)
    names = [base.arch.checkpoint_key(i, base.checkpoint.names) for i in settings.layers]
    if not absent:
        base.checkpoint.check_editable(names)
        if base.checkpoint.files.here is not None:  # a plan moves no model over the network
            base.checkpoint.check_finite()
    check_window(settings.moments, base)
    corpus = None if job.stats else corpus_of(job)
    if corpus is not None:
        _check_tokens(settings, base, corpus)
    device = device_of_job(job)
    shape = shape_of(base.config, base.arch)
    texts = count_texts(
        encoded,
        tokens_per_batch=settings.targets.tokens_per_batch
        or default_tokens_per_batch(torch.device(device)),
    )
    rates = _rates(job, device)
    work = _work(job, base, settings, shape, texts, table.batch.requests, corpus)
    shards = _shards(base.checkpoint, names)
    loads = 2 + settings.repairs
    files = base.checkpoint.size_bytes * (1 + loads) + 2 * shards["bytes_rewritten"]
    stages = {
        name: _stage(name, amount, rates["float64"] if name == "solve" else rates["model"])
        for name, amount in work.items()
    }
    stages["files"] = {
        "bytes": files,
        "seconds": _rounded(files / FILE_BYTES_PER_S),
        "arithmetic": f"model read for its checksum and loaded {loads} times, {1 + loads} × "
        f"{si(base.checkpoint.size_bytes)}B, + shards rewritten 2 × "
        f"{si(shards['bytes_rewritten'])}B, at {si(FILE_BYTES_PER_S)}B/s",
    }
    sampled = _sampled(job, settings)
    memory = memory_of(job, base, settings, shape, texts, names, sampled=bool(sampled))
    time = _time(device, stages, rates)
    spread: dict[str, Any] = {}
    if job.executor == "ray":
        protected = _protected_length(settings, base.tokenizer, table.batch.requests)
        cut = cuts(
            encoded,
            settings,
            shape,
            sampled=sampled,
            counted=corpus is not None,
            protected=protected * settings.protect.prompts,
        )
        spread["schedule"] = schedule(stages, cut, workers=workers_of(job))
        spread["moved"] = moved(
            shape,
            layers=settings.layers,
            facts=len(encoded),
            workers=workers_of(job),
            model_bytes=base.checkpoint.size_bytes,
            moments_per_layer=(corpus is not None) + (protected > 0),
            sweeps=settings.solve.sweeps,
            repairs=settings.repairs,
        )
    took = spread["schedule"]["seconds"] if spread else time["seconds"]
    held = memory.get("process_mb") or memory["each_worker_mb"]
    return {
        "summary": f"{plural(len(table.requests), 'fact')} into {layers_text(settings.layers)}: "
        f"about {duration(took)} of work and {held:,} MB"
        f"{'' if 'process_mb' in memory else ' in each worker'}; "
        f"{len(shards['rewritten'])} of {plural(shards['of'], 'shard')} rewritten",
        "model": {
            "name": base.name,
            "type": base.config.model_type,
            "parameters": shape.parameters,
            "blocks": shape.blocks,
            "bytes": base.checkpoint.size_bytes,
            "sizes_from": absent or "the headers of the weight files",
        },
        "facts": _facts(table, texts),
        "method": _method(settings, settings_origin(job, base, len(table.requests)), contexts),
        "statistics": _statistics(job, settings, corpus),
        "weights": _weights(base.checkpoint, names),
        "shards": shards,
        "stages": stages,
        "memory": memory,
        "time": time,
        **spread,
    }


def _stage(name: str, amount: Amount, rate: float) -> dict[str, Any]:
    share = EFFICIENCY[name]
    return {
        "gflop": _rounded(amount.value / 1e9),
        "seconds": _rounded(amount.value / rate / share),
        "arithmetic": f"{amount.how} = {si(amount.value)} operations,"
        f" at {share:g} of {si(rate)} a second",
    }


def _rounded(value: float) -> float:
    """Three digits: no estimate here is better."""
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded >= 100 else rounded


# ------------------------------------------------------------------------------------- the model


def _open_base(job: PlanJob, progress: Progress) -> tuple[Base, str | None]:
    """The base, and where its sizes come from if its weights are not here."""
    resolved = resolve_model(job.model, cache=job.cache_folder, progress=progress)
    placed = index_without_weights(resolved.files)
    checkpoint = None
    if placed is None:
        checkpoint = Checkpoint.open(resolved.files, cache=job.cache_folder)
    config = load_config(resolved.files)
    arch = architecture_of(config, job.architecture)
    absent = None
    if placed is not None:
        checkpoint = outline(resolved.files, config, placed)
        absent = f"config.json and the index: none of {len(checkpoint.shards)} weight files is here"
        progress.message(f"{resolved.files.location}: {absent}; `edit` needs them")
    assert checkpoint is not None
    tokenizer = load_tokenizer(resolved.files)
    base = Base(
        name=resolved.name,
        checkpoint=checkpoint,
        config=config,
        arch=arch,
        tokenizer=tokenizer,
        job=job,
    )
    return base, absent


def _weights(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    infos = [checkpoint.info(name) for name in names]
    return {
        "names": list(names),
        "shape": " × ".join(map(str, infos[0].shape)),
        "dtype": ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos})),
        "bytes": sum(info.size_bytes for info in infos),
    }


def _shards(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    """Which files are written anew and which are linked; bytes of tensors, without headers."""
    touched = {checkpoint.shard_of(name) for name in names}
    sizes = dict.fromkeys(checkpoint.shards, 0)
    for info in checkpoint.tensors.values():
        sizes[info.shard] += info.size_bytes
    rewritten = sum(sizes[shard] for shard in touched)
    return {
        "rewritten": sorted(touched),
        "of": len(checkpoint.shards),
        "bytes_rewritten": rewritten,
        "bytes_linked": sum(sizes.values()) - rewritten,
    }


# ----------------------------------------------------------------------------- facts and settings


def _contexts(settings: EditSettings, base: Base) -> tuple[str, ...]:
    """The templates of the run; in place of sampled ones, others of their length."""
    chosen = settings.contexts
    bare = contexts_of(settings, base, None)
    if chosen.kind != "sampled":
        return bare
    words = " the" * chosen.sampled_tokens
    return (*bare, *(f"{start}{words}. {{}}" for start in chosen.starts))


def _facts(table: FactTable, texts: TextCounts) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "file": table.source,
        "read": table.read,
        "accepted": len(table.requests),
        "rejected": len(table.rejects),
        "duplicates": len(table.duplicates),
        "tokens_mean": _rounded(texts.from_subject_mean),
        "tokens_max": texts.from_subject_max,
        "tokens_are": "a fact's, from the subject's last token on, in all contexts",
    }
    if table.rejects:
        facts["reasons"] = [f"row {r.row}: {r.reason}" for r in table.rejects[:10]]
    return facts


def _method(settings: EditSettings, source: str, contexts: Sequence[str]) -> dict[str, Any]:
    return {
        "name": settings.method,
        "layers": list(settings.layers),
        "lam": settings.solve.lam,
        "contexts": len(contexts),
        "context_kind": settings.contexts.kind,
        "steps": settings.targets.steps,
        "lr": settings.targets.lr,
        "clamp_norm_factor": settings.targets.clamp_norm_factor,
        "defaults": source,
    }


def _statistics(job: PlanJob, settings: EditSettings, corpus: Corpus | None) -> dict[str, Any]:
    if corpus is None:
        return {"from": str(job.stats)}
    found: dict[str, Any] = {"corpus": corpus.spec, "kind": corpus.kind}
    if corpus.files:
        found["files"] = len(corpus.files)
        found["bytes"] = sum(file.files.size(file.name) or 0 for file in corpus.files)
    return found | {"tokens": settings.moments.tokens, "window": settings.moments.window}


def _check_tokens(settings: EditSettings, base: Base, corpus: Corpus) -> None:
    """Refuse what `edit` would refuse whatever the corpus holds."""
    needed = MIN_TOKENS_PER_WIDTH * base.arch.input_width(base.config)
    if settings.moments.tokens + settings.moments.window <= needed:
        raise InputError(
            f"too few for the statistics: {settings.moments.tokens} tokens of {corpus.spec}, and"
            f" this model's keys need at least {needed}",
            field="moments.tokens",
        )


# ------------------------------------------------------------------------------------------ costs


def _work(
    job: PlanJob,
    base: Base,
    settings: EditSettings,
    shape: ModelShape,
    texts: TextCounts,
    requests: Sequence[EditRequest],
    corpus: Corpus | None,
) -> dict[str, Amount]:
    layers, moments = settings.layers, settings.moments
    work: dict[str, Amount] = {}
    if sampled := _sampled(job, settings):
        work["sampling"] = sampling_work(shape, tokens=sum(sampled), window=moments.window)
    if corpus is not None:
        work["statistics"] = statistics_work(
            shape, layers=layers, tokens=moments.tokens, window=moments.window
        )
    if length := _protected_length(settings, base.tokenizer, requests):
        tokens = length * settings.protect.prompts
        work["protection"] = statistics_work(shape, layers=layers, tokens=tokens, window=length)
    judged = _judged(job, base.tokenizer, requests)
    work["evaluation"] = evaluation_work(
        shape, tokens=judged.tokens, reads=judged.reads, generated=judged.generated
    )
    work["targets"] = targets_work(
        shape, layer=layers[-1], texts=texts, steps=settings.targets.steps
    )
    for name, amount in (
        ("keys", keys_work(shape, layers=layers, texts=texts)),
        ("solve", solve_work(shape, layers=layers, edits=len(requests))),
    ):
        swept = _times(settings.solve.sweeps, "sweeps", amount)
        work[name] = _times(1 + settings.repairs, "solves", swept)
    if rounds := settings.repairs:
        work["repair"] = Amount(
            value=rounds * REPAIRED * work["targets"].value,
            how=f"{plural(rounds, 'round')} × {REPAIRED:g} of the targets",
        )
    return work


def _times(number: int, what: str, amount: Amount) -> Amount:
    if number == 1:
        return amount
    return Amount(value=number * amount.value, how=f"{number} {what} × ({amount.how})")


def _sampled(job: PlanJob, settings: EditSettings) -> list[int]:
    """Tokens of each text that is sampled from the model: what is counted, and what is held out.

    Names for protected prompts come out of what is, or would be, counted.
    """
    if job.corpus != "self":
        return []
    needed = job.stats is None or settings.method == "memedit"
    texts = [settings.moments.tokens if needed else 0, job.evaluation_settings.heldout_tokens]
    return [tokens for tokens in texts if tokens]


def _protected_length(
    settings: EditSettings, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> int:
    """Tokens of a prompt that is protected, as long as the facts' own; 0 if none is."""
    if settings.method != "memedit" or not settings.protect.prompts:
        return 0
    return round(_prompt_length(tokenizer, _sample_of(requests)))


def _sample_of(requests: Sequence[EditRequest]) -> list[EditRequest]:
    count = min(len(requests), _JUDGED_FACTS)
    return [requests[i * len(requests) // count] for i in range(count)]


def _prompt_length(tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> float:
    """Tokens of a prompt, on average."""
    return sum(len(encode(tokenizer, request.text)) for request in requests) / len(requests)


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """Tokens that one evaluation reads, positions whose logits it needs, tokens it generates."""

    tokens: int
    reads: int
    generated: int


def _judged(
    job: PlanJob, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> _Judged:
    settings = job.evaluation_settings
    sample = _sample_of(requests)
    tokens = reads = generated = 0
    for request in sample:
        contexts = set(_asked(tokenizer, request))
        tokens += sum(map(len, plan_rows(sorted(contexts)).rows))
        reads += len(contexts)
        prompt, target = encode_completion(tokenizer, request.text, request.target_new)
        tokens += len(prompt)
        generated += len(target) + GENERATION_EXTRA_TOKENS
    scale = len(requests) / len(sample)
    prompt_length = _prompt_length(tokenizer, sample)
    fluent = min(len(requests), settings.fluency_facts)
    neighbours = len(neighbours_of(sample).measured) * scale
    near = int(neighbours) or (settings.drift_prompts if settings.heldout_tokens else 0)
    drift = min(near, settings.drift_prompts)
    texts = [p for r in consistency_sample(requests, settings) for p in r.generation_prompts]
    side_tokens = (fluent + drift) * prompt_length + settings.heldout_tokens
    side_tokens += sum(len(encode(tokenizer, text)) for text in texts)
    return _Judged(
        tokens=round(tokens * scale + side_tokens),
        reads=round(reads * scale + drift + settings.heldout_tokens),
        generated=round(generated * scale + fluent * settings.fluency_tokens)
        + len(texts) * settings.consistency_tokens,
    )


def _asked(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> Iterator[tuple[int, ...]]:
    """The contexts after which the evaluation of a fact reads a distribution."""
    for prompt, target in questions(request):
        prompt_ids, target_ids = encode_completion(tokenizer, prompt, target)
        for end in range(len(target_ids)):
            yield (*prompt_ids, *target_ids[:end])


# ------------------------------------------------------------------------------------------- time


def _rates(job: PlanJob, device: str) -> dict[str, float]:
    """Operations a second of one worker, and of the driver's solve."""
    given, threads = job.matrix_gflops, torch.get_num_threads()
    # A local Ray gives each worker its share of one machine, and one with GPUs a GPU.
    local = job.executor == "ray" and job.address is None and device == "cpu"
    share = workers_of(job) if local else 1
    if given is not None:
        return {"model": given * 1e9 / share, "float64": given * 1e9 / 2}
    try:
        torch.set_num_threads(max(1, threads // share))
        model = measured_rate(device, DTYPES[job.dtype], seconds=0.3)
    finally:
        torch.set_num_threads(threads)
    return {"model": model, "float64": measured_rate(device, torch.float64, seconds=0.2)}


def _time(device: str, stages: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    total = sum(stage["seconds"] for stage in stages.values())
    found: dict[str, Any] = {
        "device": device,
        "matrix_gflop_per_s": _rounded(rates["model"] / 1e9),
        "float64_gflop_per_s": _rounded(rates["float64"] / 1e9),
        "seconds": _rounded(total),
    }
    return found | {
        "assumes": "at most: no fact stops early, nothing kept from earlier runs; without the"
        " start of processes"
    }
