"""The jobs that people run, as data: what each command can be told, with its defaults.

One frozen dataclass a command. Its fields are the fields of the YAML job file *and* the flags of
the command line (`workflows.cli` makes the flags from them), so the two cannot drift apart. Reading
and merging the sources is `workflows.jobfile`; this module imports neither YAML nor pydantic, so
that `memedit --help` is quick.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cluster.storage import StorageSettings
from memedit.config import EditSettings, EvaluationSettings, MethodName
from memedit.errors import InputError
from workflows.fields import LARGEST_SEED, SECTIONS, option, section
from workflows.gates import Gate, parse_gate


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every command can be told."""

    json: bool = option(
        False, "Print exactly one JSON object on stdout, nothing else.", group="Reporting"
    )
    log_format: Literal["auto", "rich", "plain", "json"] = option(
        "auto",
        "Progress on stderr: bars, lines, or one JSON object a line; auto: bars on a terminal.",
        group="Reporting",
    )
    cache: Path | None = option(
        None,
        "Folder for converted models, statistics and z vectors."
        " [default: $MEMEDIT_CACHE, else ~/.cache/memedit]",
        metavar="FOLDER",
    )
    debug: bool = option(False, "Show where in the code an error arose.", group="Reporting")

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            InputError: Names one of them.
        """

    @property
    def cache_folder(self) -> Path:
        """Where converted models, statistics and z vectors are kept between runs."""
        from workflows.models import cache_folder  # imports more than --help should wait for

        return self.cache or cache_folder()


@dataclass(frozen=True, kw_only=True)
class StoringJob(Job):
    """A job that may write to object storage."""

    storage: Mapping[str, Any] = section("storage")

    @property
    def storage_settings(self) -> StorageSettings:
        """How objects are stored."""
        return StorageSettings(**self.storage)


@dataclass(frozen=True, kw_only=True)
class ModelJob(Job):
    """A job that runs a model."""

    model: str = option(
        "smollm2",
        "The base model: smollm2 (the embedded default), a folder, an s3:// prefix, or a Hugging"
        " Face id.",
        metavar="MODEL",
        location=True,
    )
    device: str = option(
        "auto",
        "Where to compute: cpu, cuda, cuda:1, or auto (a GPU when there is one).",
        group="Machine",
        metavar="DEVICE",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "The number format to compute in.", group="Machine"
    )
    seed: int | None = option(
        None,
        "Seed of the sections that set none of their own. [default: 0]",
        group="Method",
        metavar="N",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    run_id: str | None = option(
        None,
        "Name of this run in logs and in what it publishes. [default: from the time]",
        group="Reporting",
        metavar="NAME",
    )
    architecture: Mapping[str, str] = option(
        {},
        "Names of the modules of a family that memedit does not know.",
        flag=False,
    )


@dataclass(frozen=True, kw_only=True)
class TableJob(ModelJob):
    """A job over a fact table."""

    facts: str = option(
        None,
        "The fact table: JSON lines, JSON, Parquet or CSV; a path or s3:// object.",
        group="Input",
        metavar="FILE",
        required=True,
        location="path",
    )
    on_bad_row: Literal["fail", "skip"] = option(
        "fail", "A row that is wrong: stop, or leave it out.", group="Input"
    )


@dataclass(frozen=True, kw_only=True)
class SpreadJob(ModelJob):
    """A job whose work can be spread over processes and machines."""

    executor: Literal["inline", "ray"] = option(
        "inline",
        "One process, or Ray actors (started locally without --address).",
        group="Machine",
    )
    address: str | None = option(
        None,
        "The Ray cluster: auto, HOST:PORT or ray://HOST:PORT.",
        group="Machine",
        metavar="ADDRESS",
    )
    workers: int | None = option(
        None,
        "Ray actors. [default: as many as the cluster holds]",
        group="Machine",
        metavar="N",
        at_least=1,
    )
    gpus_per_worker: float = option(
        0.0,
        "GPUs of each worker; a part of one shares it, several hold a model too large for one.",
        group="Machine",
        metavar="N",
        at_least=0,
    )
    attempts: int = option(
        3,
        "How often work is tried whose Ray worker dies; then its fact is a bad row.",
        group="Machine",
        metavar="N",
        at_least=1,
    )
    stall_timeout_s: float = option(
        1800.0,
        "Seconds without any result after which a Ray worker counts as hung and is replaced.",
        group="Machine",
        metavar="S",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class WorkJob(SpreadJob):
    """A job that counts second moments, or edits with them."""

    corpus: str = option(
        "self",
        "Text for the second moments: Parquet, JSON lines or text files (column `text`),"
        " a Hugging Face dataset id, or self (sampled from the model; no data needed).",
        group="Input",
        metavar="CORPUS",
        location=True,
    )
    layers: tuple[int, ...] | None = option(
        None,
        "The layers to edit, such as 5-9 or 5,6,9. [default: by model family]",
        group="Method",
        metavar="LAYERS",
    )
    artifacts: str | None = option(
        None,
        "Folder or s3:// prefix where statistics and z vectors are kept for all machines; what one"
        " run has finished, no other does again. [default: the cache]",
        group="Machine",
        metavar="PLACE",
        location="path",
    )
    moments: Mapping[str, Any] = section("moments")

    def section_overrides(self) -> dict[str, dict[str, Any]]:
        """What was set in the sections of `memedit.config`, and nothing else."""
        names = ("contexts", "targets", "moments", "solve", "protect", "repair", "finetune")
        return {n: dict(getattr(self, n)) for n in names if getattr(self, n, None)}

    def overrides(self) -> dict[str, Any]:
        """All that was set of `EditSettings`, nested like it: the fields and the sections."""
        found: dict[str, Any] = dict(self.section_overrides())
        for name in ("method", "layers"):
            if getattr(self, name, None) is not None:
                found[name] = getattr(self, name)
        if self.seed is not None:
            for name in ("contexts", "moments", "protect", "finetune"):
                found[name] = {"seed": self.seed, **found.get(name, {})}
        return found

    def settings(self, defaults: EditSettings) -> EditSettings:
        """The settings to run with: the family's defaults under what was set."""
        changes = self.overrides()
        for name, values in changes.items():
            if name in SECTIONS:
                changes[name] = replace(getattr(defaults, name), **values)
        return replace(defaults, **changes)


@dataclass(frozen=True, kw_only=True)
class StatsJob(WorkJob, StoringJob):
    """`memedit stats`: collect second moments only."""

    out: str = option(
        None,
        "Folder or s3:// prefix for the second moments; new or empty.",
        group="Output",
        metavar="PLACE",
        required=True,
        location="path",
    )


@dataclass(frozen=True, kw_only=True)
class MethodJob(WorkJob):
    """A job that edits a model, or says what that would take."""

    stats: str | None = option(
        None,
        "Second moments made by `memedit stats`, to use instead of collecting them.",
        group="Input",
        metavar="PLACE",
        location="path",
    )
    method: MethodName = option(
        "memedit",
        "The editing method: memedit (MEMIT with protected keys and repair), memit as published, or"
        " one of its relatives.",
        group="Method",
    )
    tuned: Mapping[str, Any] = option(
        {}, "How the settings were found, as `memedit tune` writes it.", flag=False
    )
    contexts: Mapping[str, Any] = section("contexts")
    targets: Mapping[str, Any] = section("targets")
    solve: Mapping[str, Any] = section("solve")
    protect: Mapping[str, Any] = section("protect")
    repair: Mapping[str, Any] = section("repair")
    finetune: Mapping[str, Any] = section("finetune")
    evaluation: Mapping[str, Any] = section("evaluation")

    @property
    def evaluation_settings(self) -> EvaluationSettings:
        """How much is measured."""
        return EvaluationSettings(**self.evaluation)


@dataclass(frozen=True, kw_only=True)
class FactsJob(TableJob, MethodJob):
    """A job that edits a model with a fact table, or says what that would take."""


@dataclass(frozen=True, kw_only=True)
class PlanJob(FactsJob):
    """`memedit plan`: what `edit` would do, without doing it."""

    matrix_gflops: float | None = option(
        None,
        "Matrix products a second of the machine that will do the work, in 10^9 operations and the"
        " job's dtype. [default: measured here]",
        group="Machine",
        metavar="RATE",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class PublishJob(StoringJob):
    """A job that publishes a version."""

    out: str | None = option(
        None,
        "Folder or s3:// prefix for what is published; new or empty.",
        group="Output",
        metavar="PLACE",
        location="path",
    )
    registry: str | None = option(
        None,
        "Registry (folder or s3:// prefix) to publish into instead of --out: the version becomes"
        " its CURRENT.",
        group="Output",
        metavar="PLACE",
        location="path",
    )

    def check(self) -> None:
        """See `Job`: a version goes to one place."""
        if self.out is None and self.registry is None:
            raise InputError(
                "missing; give --out or --registry, or `out` or `registry` in the job file",
                field="out",
            )
        if self.out is not None and self.registry is not None:
            raise InputError("give this or out, not both", field="registry")


@dataclass(frozen=True, kw_only=True)
class EditJob(FactsJob, PublishJob):
    """`memedit edit`: the main job."""

    on_bad_row: Literal["fail", "skip"] = option(
        "fail",
        "A row that is wrong: stop before anything is written, or put it into rejects.jsonl.",
        group="Input",
    )
    format: Literal["full", "delta", "lora"] = option(
        "full",
        "What is published: a checkpoint, the update alone (for `memedit apply`), or a PEFT"
        " adapter.",
        group="Output",
    )
    lora_rank: int = option(
        256,
        "The largest rank of an adapter; with more facts the update is truncated to it.",
        group="Output",
        metavar="N",
        at_least=1,
    )
    gate: tuple[str, ...] = option(
        (),
        "Refuse to publish unless this holds, such as 'score>=80'; repeatable.",
        group="Output",
        metavar="GATE",
    )

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates, parsed."""
        return tuple(parse_gate(text) for text in self.gate)

    def check(self) -> None:
        """See `Job`: what a gate speaks of is there."""
        super().check()
        check_gates_of_one_edit(self.gates)


def check_gates_of_one_edit(gates: Sequence[Gate]) -> None:
    """Refuse gates on what only a series of versions has.

    Raises:
        InputError: Names one of them.
    """
    for gate in gates:
        if gate.group or gate.model == "previous":
            raise InputError(
                f"{gate}: groups of facts and the version before are known to `memedit ingest`",
                field="gate",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(TableJob, SpreadJob, StoringJob):
    """`memedit evaluate`: the metrics of a checkpoint on a fact table."""

    base: str | None = option(
        None,
        "The checkpoint before the edit: judged on the same facts, too (which takes as long again),"
        " for the changes and the drift.",
        metavar="MODEL",
        location=True,
    )
    out: str | None = option(
        None,
        "Folder or s3:// prefix for the result, a page and a table of facts (Parquet); new or"
        " empty. [default: printed only]",
        group="Output",
        metavar="PLACE",
        location="path",
    )
    text: str | None = option(
        None,
        "Text to measure the perplexity on: Parquet, JSON lines or text files, or a dataset id.",
        group="Input",
        metavar="CORPUS",
        location=True,
    )
    evaluation: Mapping[str, Any] = section("evaluation")

    @property
    def evaluation_settings(self) -> EvaluationSettings:
        """How much is measured."""
        return EvaluationSettings(**self.evaluation)


@dataclass(frozen=True, kw_only=True)
class GenerateJob(ModelJob):
    """`memedit generate`: greedy continuations, to try a model."""

    prompts: tuple[str, ...] = option(
        (),
        "The texts to continue.",
        group="Input",
        metavar="PROMPT...",
        positional=True,
        required=True,
    )
    tokens: int = option(
        20,
        "Tokens to add to each prompt; fewer where the model reads no further.",
        group="Output",
        metavar="N",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class DoctorJob(Job):
    """`memedit doctor`: what is installed, reachable and missing, with the remedy."""

    full: bool = option(
        False, "Also start a local Ray and stop it again (some ten seconds).", group="Checks"
    )


def new_run_id() -> str:
    """A name for a run: the time (UTC) to the second, and four random hexadecimal digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
