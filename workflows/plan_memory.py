"""The memory that a plan asks for, process by process: `memedit.cost` with the job's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from memedit import generate
from memedit.config import EditSettings
from memedit.cost import (
    ModelShape,
    TextCounts,
    driver_memory,
    evaluation_memory,
    sampling_memory,
    worker_memory,
)
from memedit.model import DTYPES
from workflows.session import Base, device_of_job, gpus_of_job
from workflows.settings import PlanJob

_INTERPRETER_BYTES = 700e6
"""Python with torch, transformers and their buffers; measured (`benchmarks.prediction`)."""
_DRIVER_BYTES = 900e6
"""The same beside Ray's client, the tables of facts and text, and the report."""


def memory_of(
    job: PlanJob,
    base: Base,
    settings: EditSettings,
    shape: ModelShape,
    texts: TextCounts,
    names: Sequence[str],
    *,
    sampled: bool,
) -> dict[str, Any]:
    """What each process holds at most, and how that was worked out.

    `names` are those of the edited tensors; `sampled` says whether text is sampled from the model.
    """
    workers = workers_of(job)
    itemsize = DTYPES[job.dtype].itemsize
    worker = worker_memory(
        shape,
        layers=settings.layers,
        texts=texts,
        itemsize=itemsize,
        workers=workers,
        sweeps=settings.solve.sweeps,
    )
    stored = max(base.checkpoint.info(name).dtype.itemsize for name in names)
    driver = driver_memory(
        shape,
        layers=settings.layers,
        edits=texts.facts,
        itemsize=stored,
        trials=2 if settings.repairs else 1,
    )
    protected = settings.method == "memedit" and settings.protect.prompts
    if job.stats is not None and not protected:  # nothing is counted
        del worker["statistics"], driver["moments"]
    if sampled:
        worker["sampling"] = sampling_memory(
            shape, window=settings.moments.window, itemsize=itemsize
        )
    worker["evaluation"] = evaluation_memory(
        shape,
        tokens=generate.default_tokens_per_batch(torch.device(device_of_job(job))),
        itemsize=itemsize,
    )
    # Stages come one after the other; keys and states stay while a layer is solved.
    at_solve = driver["updates"].value + max(driver["solve"].value, driver["publish"].value)
    model, keys = worker["model"].value, worker["keys"].value
    peaks = {name: amount.value for name, amount in worker.items() if name not in ("model", "keys")}
    worker_peak = model + max(*peaks.values(), keys)
    beside = {**peaks, "keys and solve": keys + at_solve}
    # Added up from blocks of the workers' rows.
    gathered = driver["moments"].value if "moments" in driver else 0.0
    if job.executor == "inline":
        stage = max(beside, key=lambda name: beside[name])
        total: dict[str, Any] = {
            "process_mb": _mb(_INTERPRETER_BYTES + model + beside[stage]),
            "process_arithmetic": f"interpreter {_mb(_INTERPRETER_BYTES):,} MB + model"
            f" {_mb(model):,} MB + {stage} {_mb(beside[stage]):,} MB",
        }
    else:
        total = {
            "each_worker_mb": _mb(_INTERPRETER_BYTES + worker_peak),
            "driver_mb": _mb(_DRIVER_BYTES + max(gathered, at_solve)),
        }
    if (gpus := gpus_of_job(job)) > 1:
        # What stands beside the weights may all be on one of them.
        total["each_gpu_mb"] = _mb(model / gpus + worker_peak - model)
        total["each_gpu_arithmetic"] = (
            f"model {_mb(model):,} MB / {gpus} GPUs + {_mb(worker_peak - model):,} MB beside it"
        )
    parts = {f"worker_{name}": amount for name, amount in worker.items()}
    parts |= {f"driver_{name}": amount for name, amount in driver.items()}
    shown: dict[str, Any] = {"workers": workers, **total}
    for name, amount in parts.items():
        shown[name] = f"{_mb(amount.value):,} MB = {amount.how}"
    return shown


def _mb(value: float) -> int:
    return math.ceil(value / 1e6)


def workers_of(job: PlanJob) -> int:
    """How many workers are planned for."""
    return (job.workers or 1) if job.executor == "ray" else 1
