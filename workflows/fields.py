"""What a field of a job is made of: its default, its help, its limits, where it may be set.

Imports neither YAML nor pydantic, so that `memedit --help` is quick. Knows no job
(`workflows.settings`).
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any, Literal

from cluster.storage import StorageSettings
from memedit.config import (
    ContextSettings,
    EvaluationSettings,
    FineTuneSettings,
    MomentSettings,
    ProtectSettings,
    RepairSettings,
    SolveSettings,
    TargetSettings,
    TraceSettings,
)
from memedit.errors import InputError

SECTIONS: dict[str, type] = {
    "contexts": ContextSettings,
    "targets": TargetSettings,
    "moments": MomentSettings,
    "solve": SolveSettings,
    "protect": ProtectSettings,
    "repair": RepairSettings,
    "finetune": FineTuneSettings,
    "evaluation": EvaluationSettings,
    "trace": TraceSettings,
    "storage": StorageSettings,
}
"""The sections of a job file. A job keeps of each only what was set: the defaults of those of
`EditSettings` depend on the model's family."""

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
    "solve.sweeps": 1,
    "solve.sums_above": 0,
    "protect.prompts": 0,
    "protect.weight": 0,
    "protect.seed": 0,
    "repair.rounds": 0,
    "repair.drift": 0,
    "repair.prompts": 1,
    "finetune.steps": 1,
    "finetune.weight_decay": 0,
    "finetune.batch": 1,
    "finetune.loss_threshold": 0,
    "finetune.seed": 0,
    "evaluation.drift_prompts": 0,
    "evaluation.fluency_facts": 0,
    "evaluation.fluency_tokens": 1,
    "evaluation.heldout_tokens": 0,
    "evaluation.heldout_window": 2,
    "evaluation.facts_per_portion": 1,
    "evaluation.tokens_per_batch": 1,
    "trace.samples": 1,
    "trace.window": 1,
    "trace.seed": 0,
    "trace.tokens_per_batch": 1,
}
ABOVE: dict[str, float] = {
    "targets.lr": 0,
    "targets.clamp_norm_factor": 0,
    "solve.lam": 0,
    "solve.null_threshold": 0,
    "finetune.lr": 0,
    "trace.noise": 0,
}
"""The smallest values that mean something, of section fields; `option` has those of job fields."""
LARGEST_SEED = 2**32 - 1
"""Sampling counts on from a seed times 2^20, and torch's generators take 64 bits."""
AT_MOST: dict[str, float] = {
    "contexts.seed": LARGEST_SEED,
    "moments.seed": LARGEST_SEED,
    "protect.seed": LARGEST_SEED,
    "finetune.seed": LARGEST_SEED,
    "trace.seed": LARGEST_SEED,
}
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
    location: bool | Literal["path"] = False,
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
        location: A text that may name a file or folder, relative to the job file; "path": one
            that names nothing else but a place in object storage.
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
