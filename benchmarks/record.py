"""Where results go: one JSON file a run, and one row a run in a table that a person reads.

Knows the folder `benchmarks/results/`, the machine's description and the code version. Does not
know what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


@cache
def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        if info.is_file()
        else []
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def code_version() -> str:
    """The commit, with `+` where files that git knows have changed; "unknown" outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=RESULTS.parent, check=True
        )
        return done.stdout.strip()

    paths = ("../memedit", "../cluster", "../workflows")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command line that started this run."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])


def today() -> str:
    """The date, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def save_json(name: str, result: Mapping[str, Any]) -> Path:
    """Write one run with its circumstances; never over an older one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    whole = {
        "date": today(),
        "command": command(),
        "code": code_version(),
        "machine": machine(),
        **result,
    }
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"stored {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def append_row(name: str, cells: Mapping[str, str]) -> None:
    """Append a row to `results/<name>.md`; another set of columns begins another table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    about = machine()
    row = {
        "date": today(),
        "machine": f"{about['processor']}, {about['cores']} cores"
        + (f", {about['gpu']}" if about["gpu"] else ""),
        "code": code_version(),
        **cells,
        "command": f"`{command()}`",
    }
    head = _line(list(row)) + _line(["---"] * len(row))
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    heads = [line for line in known.splitlines(keepends=True) if line.startswith("| date |")]
    with path.open("a", encoding="utf-8") as out:
        if not heads or heads[-1] != _line(list(row)):
            out.write(("\n" if known else "") + head)
        out.write(_line([str(cell) for cell in row.values()]))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
