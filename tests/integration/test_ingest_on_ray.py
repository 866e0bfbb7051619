"""A night of `memedit ingest` on Ray actors, against the same night in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memedit.checkpoint import Checkpoint
from tests.workflows.ingestion.nights import DARRIEUX, EIFFEL, QUICK, TOYOTA, Nights
from tests.workflows.runs import without_plots

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_night_on_ray_makes_the_same_version(
    input_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    torch.set_num_threads(1)
    base = input_folder / "base"
    versions = {}
    for kind, more in (("inline", {}), ("ray", {"executor": "ray", "workers": 2})):
        nights = Nights(folder=tmp_path / kind, base=base, cache=tmp_path / f"{kind}-cache")
        nights.deliver("1", EIFFEL, DARRIEUX, TOYOTA)
        result = nights.ingest(edit={**QUICK, **more}, gates=["generation>=0"]).result
        assert result["targets"] == {"computed": 3, "reused": 0}
        versions[kind] = (result["run_id"], Checkpoint.open(nights.version))
    assert versions["inline"][0] == versions["ray"][0]
    before = Checkpoint.open(base)
    moved = 0
    for name in before.names:
        start, mine, theirs = (
            c.read(name).double() for c in (before, versions["inline"][1], versions["ray"][1])
        )
        change = (mine - start).norm()
        moved += bool(change > 0)
        assert (mine - theirs).norm() <= 1e-4 * change, name
    assert moved == 2
