"""Jobs on a disk that has no room: exit code 2, the file named, nothing half written.

A limit on the size of files stands for the disk; the kernel refuses the write as it would there.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from memedit.manifest import MANIFEST_NAME
from tests.tiny import save_tiny
from tests.workflows.runs import edit, memedit, stats, without_plots, write_rows


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_plots(monkeypatch)
    return write_rows(tmp_path / "facts.jsonl")


@pytest.mark.parametrize("more", [(), ("--format", "delta"), ("--format", "lora")])
def test_every_file_of_an_edit(
    base: Path, facts: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "sub" / "out"
    warm = edit(base, facts, tmp_path / "warm", cache, *more)
    assert warm.code == 0, warm.stderr
    found = {path.name: path.stat() for path in (tmp_path / "warm").iterdir()}
    # A link takes no room; the manifest is not of one size.
    sizes = {n: s.st_size for n, s in found.items() if s.st_nlink == 1 and n != MANIFEST_NAME}
    assert len(sizes) > 2
    named = set()
    for size in sorted({*sizes.values()}):  # up to the largest, each file once has no room
        with files_of_at_most(size - 1):
            ran = edit(base, facts, out, cache, *more)
        assert ran.code == 2, ran.stdout + ran.stderr
        assert "File too large" in ran.error["message"]
        named.add(Path(ran.error["source"]).name)
        assert not out.parent.exists()
    assert named & sizes.keys(), named
    again = edit(base, facts, out, cache, *more)
    assert again.code == 0, again.stderr


def test_what_is_kept_for_later_runs(base: Path, facts: Path, tmp_path: Path) -> None:
    for size in (100, 5_000):  # windows or z vectors; second moments
        with files_of_at_most(size):
            ran = edit(base, facts, tmp_path / "out", tmp_path / "cache")
        assert ran.code == 2, ran.stdout + ran.stderr
        source = Path(ran.error["source"])
        assert source.is_relative_to(tmp_path / "cache")
        assert not source.exists() and not list((tmp_path / "cache").rglob("*.partial"))
    assert not (tmp_path / "out").exists()


def test_statistics_and_an_applied_delta(base: Path, facts: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert stats(base, tmp_path / "warm", cache).code == 0
    delta = tmp_path / "delta"
    assert edit(base, facts, delta, cache, "--format", "delta").code == 0
    with files_of_at_most(1_000):
        ran = stats(base, tmp_path / "stats", cache)
        applied = memedit("apply", delta, "--out", tmp_path / "out", "--json")
    for each, name in ((ran, "stats"), (applied, "out")):
        assert each.code == 2, each.stdout + each.stderr
        assert f".{name}.partial-" in each.error["source"]
        assert not (tmp_path / name).exists()
