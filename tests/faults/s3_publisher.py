"""A publication in a process of its own, to be killed, stopped or run beside another one."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from cluster.store import open_files
from memedit.checkpoint import Checkpoint
from memedit.errors import MemeditError
from tests.cluster.s3_places import publish

EDITED = ("model.layers.0.self_attn.o_proj.weight",)


def _publish(
    environment: Mapping[str, str], base: str, out: str, run_id: str, told: Connection
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        publish(Checkpoint.open(open_files(base)), out, EDITED, run_id=run_id)
        told.send((0, ""))
    except MemeditError as error:
        told.send((error.exit_code, "".join(traceback.format_exception(error))))


class Publisher:
    """Publishes `base` to `out` with the weights `EDITED` negated, in a new process.

    Its parent is multiprocessing's fork server, which has imported everything and has no threads.

    Args:
        environment: Variables that it shall have.
        base: Where the base lies.
        out: Where to.
        run_id: Which run it is.
    """

    def __init__(
        self, environment: Mapping[str, str], base: str, out: str, run_id: str = "first"
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.s3_publisher"])
        self._told, telling = context.Pipe(duplex=False)
        arguments = (dict(environment), base, out, run_id, telling)
        self._process: BaseProcess = context.Process(target=_publish, args=arguments, daemon=True)
        self._process.start()
        telling.close()

    @property
    def process_id(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def has_ended(self, within_s: float) -> bool:
        """Whether it ends before the time is over."""
        return bool(wait([self._process.sentinel], within_s))

    def outcome(self, within_s: float = 120) -> tuple[int, str]:
        """Wait for its end; the exit code of memedit and the traceback, or (-9, "") if killed."""
        self._process.join(within_s)
        assert self._process.exitcode is not None, "the publisher does not end"
        if self._process.exitcode == 0:
            code, text = self._told.recv()
            return int(code), str(text)
        return self._process.exitcode, ""
