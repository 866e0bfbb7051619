"""What an edit publishes: a full checkpoint, its delta alone, or a LoRA adapter.

Each is loaded again by the workers before it is judged, so that the metrics are those of what was
saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cluster.publication import Publication
from memedit.checkpoint import Checkpoint
from memedit.checksums import FileRecord
from memedit.delta import DELTA_NAME, save_delta
from memedit.executor import Executor
from memedit.lora import low_rank, save_lora, updates_of_lora
from memedit.manifest import RankRecord, TensorRecord
from memedit.patching import Patch, records_of_patches, write_patched
from memedit.progress import Progress
from memedit.solve import Update
from memedit.stages import SolvedLayer
from workflows.session import Base
from workflows.settings import EditJob


@dataclass(frozen=True, kw_only=True)
class Product:
    """What was written, and how workers load it."""

    format: str
    load: Callable[[Executor], None]
    tensors: Mapping[str, TensorRecord]
    """The edited tensors as they are in the full checkpoint, or as they become."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    ranks: Mapping[str, RankRecord] = field(default_factory=dict)


def make_product(
    job: EditJob,
    base: Base,
    solved: Sequence[SolvedLayer],
    names: Mapping[int, str],
    publication: Publication,
    progress: Progress,
) -> Product:
    """Write what the job's format says, into the publication.

    Raises:
        NumericalError: An edited tensor does not fit its dtype.
    """
    updates = {names[s.update.layer]: s.update for s in solved}
    if job.format == "full":
        patches = patches_of(updates, transposed=base.arch.family.conv1d)
        patched = write_patched(base.checkpoint, publication.sink, patches, progress=progress)
        return Product(
            format="full",
            load=lambda executor: _load(executor, base, publication, patched.tensors),
            files=patched.files,
            tensors=patched.tensors,
        )
    progress.start("publish", total=1, unit="files")
    ranks: dict[str, RankRecord] = {}
    if job.format == "delta":
        save_delta(publication.staging / DELTA_NAME, updates)
    else:
        factors = {name: low_rank(u, limit=job.lora_rank) for name, u in updates.items()}
        save_lora(
            publication.staging,
            {_module(base, part.layer): part for part in factors.values()},
            base_model=base.name,
            fan_in_fan_out=base.arch.family.conv1d,
        )
        ranks = {
            name: RankRecord(rank=part.rank, truncation_error=part.truncation_error)
            for name, part in factors.items()
        }
        updates = updates_of_lora(factors)
    patches = patches_of(updates, transposed=base.arch.family.conv1d)
    tensors = records_of_patches(base.checkpoint, patches)
    progress.finish("publish")
    return Product(
        format=job.format,
        load=lambda executor: _apply(executor, base, updates),
        tensors=tensors,
        ranks=ranks,
    )


def patches_of(updates: Mapping[str, Update], *, transposed: bool) -> dict[str, Patch]:
    """W -> W + Δ in float64 by checkpoint key; `transposed` where W is stored [I, O]."""

    def patch(update: Update) -> Patch:
        def rows(weight: torch.Tensor, start: int) -> torch.Tensor:
            delta = update.rows(start, start + len(weight), transposed=transposed)
            return weight.double() + delta

        return rows

    return {name: patch(update) for name, update in updates.items()}


def _load(
    executor: Executor,
    base: Base,
    publication: Publication,
    tensors: Mapping[str, TensorRecord],
) -> None:
    """What was saved, which must be what was meant to be."""
    sha256 = {name: record.sha256 for name, record in tensors.items()}
    executor.broadcast("load", base.spec(files=publication.files, published=sha256))


def _apply(executor: Executor, base: Base, updates: Mapping[str, Update]) -> None:
    """The base with the updates added, bit by bit what `memedit apply` writes."""
    executor.broadcast("load", base.spec())
    for name, update in updates.items():
        executor.broadcast("apply", update, _stored(base.checkpoint, name))


def _stored(checkpoint: Checkpoint, name: str) -> torch.dtype:
    return checkpoint.info(name).dtype


def _module(base: Base, layer: int) -> str:
    """The path of a layer's rewrite module in the causal language model, as PEFT names it."""
    return base.arch.weight_name(layer).removesuffix(".weight")
