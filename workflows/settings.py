"""The jobs that people run, as data: what each command can be told, with its defaults.

One frozen dataclass a command. Its fields are the fields of the YAML job file *and* the flags of
the command line (`workflows.cli` makes the flags from them), so the two cannot drift apart. Reading
and merging the sources is `workflows.jobfile`; this module imports neither YAML nor pydantic, so
that `memedit --help` is quick.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from memedit.config import (
    ContextSettings,
    EditSettings,
    EvaluationSettings,
    MomentSettings,
    SolveSettings,
    TargetSettings,
)
from memedit.errors import InputError
from workflows.gates import Gate, parse_gate

SECTIONS: dict[str, type] = {
    "contexts": ContextSettings,
    "targets": TargetSettings,
    "moments": MomentSettings,
    "solve": SolveSettings,
    "evaluation": EvaluationSettings,
}
"""The sections of a job file. A job keeps of each only what was set: the defaults of the four
sections of `memedit.config` depend on the model's family."""

AT_LEAST: dict[str, float] = {
    "contexts.sampled_tokens": 1,
    "contexts.seed": 0,
    "targets.steps": 2,
    "targets.tokens_per_batch": 1,
    "targets.v_weight_decay": 0,
    "targets.kl_factor": 0,
    "targets.loss_threshold": 0,
    "moments.tokens": 1,
    "moments.window": 2,
    "moments.seed": 0,
    "moments.tolerance": 0,
    "solve.ridge": 0,
    "evaluation.drift_prompts": 0,
    "evaluation.fluency_facts": 0,
    "evaluation.fluency_tokens": 1,
    "evaluation.heldout_tokens": 0,
    "evaluation.heldout_window": 2,
    "evaluation.facts_per_portion": 1,
    "evaluation.tokens_per_batch": 1,
}
ABOVE: dict[str, float] = {
    "targets.lr": 0,
    "targets.clamp_norm_factor": 0,
    "solve.lam": 0,
}
"""The smallest values that mean something, of section fields; `option` has those of job fields."""
LARGEST_SEED = 2**32 - 1
"""Sampling counts on from a seed times 2^20, and torch's generators take 64 bits."""
AT_MOST: dict[str, float] = {"contexts.seed": LARGEST_SEED, "moments.seed": LARGEST_SEED}
"""The largest values that work."""


def option(
    default: Any,
    help: str,
    *,
    group: str = "Model",
    metavar: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    positional: bool = False,
    required: bool = False,
    location: bool = False,
    flag: bool = True,
) -> Any:
    """A field of a job, with what the command line and the job file need to know about it.

    Args:
        default: The value when no source sets it.
        help: One sentence for `--help`.
        group: The heading in `--help`.
        metavar: What stands for the value in `--help`.
        at_least: The smallest value allowed.
        at_most: The largest value allowed.
        positional: Given without a flag.
        required: No default; the job is refused without it.
        location: A text that may name a file or folder, relative to the job file.
        flag: Whether it is a flag; sections are set with `--set` only.
    """
    metadata = {
        "help": help,
        "group": group,
        "metavar": metavar,
        "at_least": at_least,
        "at_most": at_most,
        "positional": positional,
        "required": required,
        "location": location,
        "flag": flag,
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(name: str) -> Any:
    """A section of a job: a mapping that holds only what was set."""
    return option({}, f"Fields of the section `{name}`.", flag=False)


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

    @property
    def cache_folder(self) -> Path:
        """Where converted models, statistics and z vectors are kept between runs."""
        from workflows.models import cache_folder  # imports more than --help should wait for

        return self.cache or cache_folder()


@dataclass(frozen=True, kw_only=True)
class ModelJob(Job):
    """A job that runs a model."""

    model: str = option(
        "smollm2",
        "The base model: smollm2 (the embedded default), a folder, or a Hugging Face id.",
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
class WorkJob(ModelJob):
    """A job whose work can be spread over processes and machines."""

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
        0.0, "GPUs that each Ray actor asks for.", group="Machine", metavar="N", at_least=0
    )
    moments: Mapping[str, Any] = section("moments")

    def section_overrides(self) -> dict[str, dict[str, Any]]:
        """What was set in the sections of `memedit.config`, and nothing else."""
        names = ("contexts", "targets", "moments", "solve")
        return {n: dict(getattr(self, n)) for n in names if getattr(self, n, None)}

    def overrides(self) -> dict[str, Any]:
        """All that was set of `EditSettings`, nested like it: the fields and the sections."""
        found: dict[str, Any] = dict(self.section_overrides())
        for name in ("method", "layers"):
            if getattr(self, name, None) is not None:
                found[name] = getattr(self, name)
        if self.seed is not None:
            for name in ("contexts", "moments"):
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
class StatsJob(WorkJob):
    """`memedit stats`: collect second moments only."""

    out: Path = option(
        None, "Folder for the second moments.", group="Output", metavar="FOLDER", required=True
    )


@dataclass(frozen=True, kw_only=True)
class FactsJob(WorkJob):
    """A job over a fact table."""

    facts: Path = option(
        None,
        "The fact table: JSON lines, JSON, Parquet or CSV.",
        group="Input",
        metavar="FILE",
        required=True,
    )
    on_bad_row: Literal["fail", "skip"] = option(
        "fail",
        "A row that is wrong: stop before anything is written, or put it into rejects.jsonl.",
        group="Input",
    )
    stats: Path | None = option(
        None,
        "Second moments made by `memedit stats`, to use instead of collecting them.",
        group="Input",
        metavar="FOLDER",
    )
    method: Literal["memit"] = option("memit", "The editing method.", group="Method")
    contexts: Mapping[str, Any] = section("contexts")
    targets: Mapping[str, Any] = section("targets")
    solve: Mapping[str, Any] = section("solve")
    evaluation: Mapping[str, Any] = section("evaluation")

    @property
    def evaluation_settings(self) -> EvaluationSettings:
        """How much is measured."""
        return EvaluationSettings(**self.evaluation)


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
class EditJob(FactsJob):
    """`memedit edit`: the main job."""

    out: Path = option(
        None,
        "Folder for the patched checkpoint and the report; new or empty.",
        group="Output",
        metavar="FOLDER",
        required=True,
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


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(ModelJob):
    """`memedit evaluate`: the metrics of a checkpoint on a fact table."""

    facts: Path = option(
        None,
        "The fact table: JSON lines, JSON, Parquet or CSV.",
        group="Input",
        metavar="FILE",
        required=True,
    )
    base: str | None = option(
        None,
        "The checkpoint before the edit, to measure the drift against.",
        metavar="MODEL",
        location=True,
    )
    text: str | None = option(
        None,
        "Text to measure the perplexity on: Parquet, JSON lines or text files, or a dataset id.",
        group="Input",
        metavar="CORPUS",
        location=True,
    )
    on_bad_row: Literal["fail", "skip"] = option(
        "fail", "A row that is wrong: stop, or leave it out.", group="Input"
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
class VerifyJob(Job):
    """`memedit verify`: check a published version against its manifest."""

    version: Path = option(
        None,
        "The checkpoint folder that holds memedit.json.",
        group="Input",
        metavar="FOLDER",
        positional=True,
        required=True,
    )


@dataclass(frozen=True, kw_only=True)
class DoctorJob(Job):
    """`memedit doctor`: what is installed, reachable and missing, with the remedy."""

    full: bool = option(
        False, "Also start a local Ray and stop it again (some ten seconds).", group="Checks"
    )


JOBS: dict[str, type[Job]] = {
    "edit": EditJob,
    "stats": StatsJob,
    "evaluate": EvaluateJob,
    "generate": GenerateJob,
    "plan": PlanJob,
    "verify": VerifyJob,
    "doctor": DoctorJob,
}
"""The command of each job."""


def new_run_id() -> str:
    """A name for a run: the time (UTC) to the second, and four random hexadecimal digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def parse_layers(value: object) -> object:
    """`"5-7,9"`, `7` or `[5, 6, 7, 9]` as the layers in ascending order, each once.

    Raises:
        InputError: it is none of these, or a layer is negative.
    """
    wrong = InputError(f"not layers: {value!r}; write 5-9, or 5,6,9, or [5, 6, 9]")
    if isinstance(value, list | tuple):
        parts = [str(part) for part in value]
    else:
        parts = str(value).split(",")
    layers: set[int] = set()
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise wrong
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise wrong
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))
