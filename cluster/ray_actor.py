"""What runs in each process that Ray starts: a `memedit.worker.Worker` behind a few calls.

Knows how a new worker gets into the state of one that has died; does not know who calls it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

import memedit
from cluster.placement import Placement
from memedit.errors import InputError, MemeditError
from memedit.model import ModelSpec
from memedit.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker runs."""

    node: str
    pid: int
    version: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.node}"


class Actor:
    """A `Worker` in a Ray process of its own."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._worker: Worker | None = None

    def seat(self) -> Seat:
        """Where this runs."""
        return Seat(node=self._node, pid=os.getpid(), version=memedit.__version__)

    def begin(self, spec: ModelSpec, story: Sequence[tuple[str, list[Any]]]) -> Seat:
        """Load the model and do again what has changed it."""
        if story and story[0][0] == "load":  # what was loaded first is not needed any more
            (_, (newest,)), story = story[0], story[1:]
            spec = ray.get(newest)
        self._worker = Worker(self._here(spec), threads=self._placement.threads)
        for method, stored in story:
            self.collect(method, *ray.get(stored))
        return self.seat()

    def follow(self, method: str, *arguments: Any) -> Seat:
        """Do what was asked for after `begin` was."""
        self.collect(method, *arguments)
        return self.seat()

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """The items of one call of a method of the worker, as they are made."""
        if self._worker is None:
            raise MemeditError("this worker could not load the model")
        given = (self._here(a) if isinstance(a, ModelSpec) else a for a in arguments)
        # Not `yield from`: Ray resumes with a value, which a plain iterator behind it cannot take.
        for item in getattr(self._worker, method)(*given):  # noqa: UP028
            yield item

    def collect(self, method: str, *arguments: Any) -> list[Any]:
        """All items of one call."""
        return list(self.stream(method, *arguments))

    def _here(self, spec: ModelSpec) -> ModelSpec:
        """The same model for this process, which sees other GPUs and perhaps other folders."""
        if spec.files.here is not None and not spec.files.here.is_dir():
            raise InputError(
                f"the worker on {self._node} sees no such folder; put it where every machine of "
                "the cluster finds it under the same path, or into object storage",
                source=spec.files.here,
            )
        if spec.device == "cpu":
            return spec
        if not torch.cuda.is_available():
            raise InputError(
                f"torch {torch.__version__} on {self._node} sees no GPU there, though the cluster "
                "lends one; install a CUDA build of torch on it, or use the device cpu",
                field="device",
            )
        # Ray shows a process only the GPUs it was given.
        return replace(spec, device="cuda", gpus=max(1, int(self._placement.gpus)))
