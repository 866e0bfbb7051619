"""Opens the executor that a job asks for. Ray is imported only when it is asked for."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Literal

from cluster.dispatch import Rules
from memedit.errors import InputError
from memedit.executor import Executor, InlineExecutor
from memedit.model import ModelSpec
from memedit.progress import Progress


def open_executor(
    kind: Literal["inline", "ray"],
    spec: ModelSpec,
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    threads: int | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Executor:
    """Load the model where the work will be done.

    Args:
        kind: "inline" for this process, "ray" for Ray actors.
        spec: The model.
        address: Of the Ray cluster: `auto`, HOST:PORT or ray://HOST:PORT. None takes the
            environment's (`RAY_ADDRESS`, as in a Ray job) or starts a local one.
        workers: Ray actors; None for as many as the cluster holds.
        gpus_per_worker: GPUs of each Ray actor.
        threads: Threads of each worker; None for torch's choice inline and a fair share on Ray.
        rules: How often and how long Ray's failures are put up with.
        progress: Told of the units that end at Ray workers, and of failures that were mended.

    Raises:
        InputError: The model cannot be loaded, or the cluster cannot be reached or is too small.
    """
    if kind == "inline":
        return InlineExecutor(spec, threads=threads)
    address = address or os.environ.get("RAY_ADDRESS") or None
    prepare_ray(local=address is None)
    try:
        from cluster.ray_executor import RayExecutor
    except ImportError as error:
        raise InputError(
            f"Ray cannot be imported ({error}); pip install 'ray[default]', or use inline",
            field="executor",
        ) from error
    return RayExecutor(
        spec,
        address=address,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        threads=threads,
        rules=rules,
        progress=progress,
    )


def prepare_ray(*, local: bool) -> None:
    """Set what Ray reads from the environment on import and hands on; what is set already stays.

    Its own messages are kept off the terminal, where the run's are. A local Ray is closed to
    everybody else: it asks for a token and listens on 127.0.0.1 only.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if not local:
        return
    if "ray" not in sys.modules:  # otherwise it has made its choice, which holds for all its parts
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        # In spite of its name this is what makes Ray listen on 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Processes that no actor would use cost memory and start-up time.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # Ray would write one into the home folder.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
