"""The same facts give the same published bytes: whatever the order, the split into runs, retries.

From the same z vectors every bit is the same; from none, a z vector's last bits depend on the batch
that it was found in, so weights agree to 1e-4 of the update.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memedit.checkpoint import Checkpoint
from tests.tiny import save_tiny
from tests.workflows.ingestion.nights import DARRIEUX, EIFFEL, TOYOTA, Nights
from tests.workflows.runs import shards, without_plots

pytestmark = pytest.mark.slow

LOUVRE = {"id": "louvre", "subject": "Louvre", "prompt": "{} stands in", "target_new": "Rome"}
# What was said first is corrected, and one fact is taken back, at times that the rows tell.
ROWS: list[dict[str, Any]] = [
    {**EIFFEL, "target_new": "Madrid", "asserted_at": "2026-01-01"},
    {**EIFFEL, "asserted_at": "2026-01-02"},
    {**DARRIEUX, "asserted_at": "2026-01-01"},
    {**TOYOTA, "asserted_at": "2026-01-01"},
    {**LOUVRE, "asserted_at": "2026-01-01"},
    {**LOUVRE, "target_new": "Berlin", "asserted_at": "2025-12-31"},
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """All rows in one run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ingested")
    nights = Nights(
        folder=folder / "reference", base=save_tiny(folder / "base"), cache=folder / "cache"
    )
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        nights.deliver("all", *ROWS)
        assert nights.ingest().result["facts"]["active"] == 4
    return nights


def deliveries(
    reference: Nights, folder: Path, parts: Sequence[Sequence[int]], *, keep_z: bool
) -> Nights:
    """A registry of its own, filled night by night."""
    nights = Nights(folder=folder, base=reference.base, cache=reference.cache)
    if keep_z:
        shutil.copytree(reference.registry / "artifacts", nights.registry / "artifacts")
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        for number, part in enumerate(parts):
            nights.deliver(str(number), *(ROWS[i] for i in part))
            assert nights.ingest().code == 0
            assert nights.ingest().result["status"] == "unchanged"  # a retry
    return nights


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(order=st.permutations(range(len(ROWS))), cuts=st.sets(st.integers(1, 5), max_size=2))
def test_the_same_bytes_whatever_the_order_and_the_split(
    reference: Nights, tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int]
) -> None:
    edges = [0, *sorted(cuts), len(order)]
    parts = [order[a:b] for a, b in pairwise(edges)]
    folder = tmp_path_factory.mktemp("split") / "nights"
    nights = deliveries(reference, folder, parts, keep_z=True)
    assert nights.current == reference.current
    assert shards(nights.version) == shards(reference.version)
    facts = "facts.jsonl"
    assert (nights.version / facts).read_bytes() == (reference.version / facts).read_bytes()


def test_from_no_z_vectors_the_update_agrees_to_1e_4(reference: Nights, tmp_path: Path) -> None:
    nights = deliveries(reference, tmp_path / "own", [[4, 3], [2, 0], [1, 5]], keep_z=False)
    assert nights.current == reference.current
    base = Checkpoint.open(reference.base)
    one, two = Checkpoint.open(reference.version), Checkpoint.open(nights.version)
    moved = 0
    for name in base.names:
        before, mine, theirs = (c.read(name).double() for c in (base, one, two))
        change = (mine - before).norm()
        moved += bool(change > 0)
        assert (mine - theirs).norm() <= 1e-4 * change, name
    assert moved == 2
