"""Opens the executor that a job asks for. Ray is imported only when it is asked for."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Literal

from memedit.errors import InputError
from memedit.executor import Executor, InlineExecutor
from memedit.model import ModelSpec


def open_executor(
    kind: Literal["inline", "ray"],
    spec: ModelSpec,
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    threads: int | None = None,
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

    Raises:
        InputError: The model cannot be loaded, or the cluster cannot be reached or is too small.
    """
    if kind == "inline":
        return InlineExecutor(spec, threads=threads)
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None:
        _shield_local_ray()
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
    )


def _shield_local_ray() -> None:
    """Close a Ray that this process starts to everybody else; what the user has set stays.

    Ray reads its environment on import and hands it on to its processes, so this comes first.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        # In spite of its name it is what makes Ray listen on 127.0.0.1 only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Workers that no actor would use cost memory and start-up time.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # Otherwise Ray writes one into the home folder.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
