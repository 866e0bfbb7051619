"""Clusters that cannot be used: what is no address, another Ray, machines without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import ray_cluster
from cluster.placement import Placement
from cluster.ray_actor import Actor
from memedit.errors import InputError
from memedit.files import LocalFiles
from memedit.model import ModelSpec

OTHER_VERSION = """Version mismatch: The cluster was started with:
    Ray: 2.55.0
    Python: 3.12.1
This process on node 127.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""
"""As Ray 2.60 said to a cluster of Ray 2.55, by HOST:PORT and by ray://."""


@pytest.mark.parametrize(
    "address", ["head", "head:six", "http://head:8265", "ray://head", "tcp://head:6379", ":6379"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="write auto, HOST:PORT or ray://HOST:PORT"):
        ray_cluster.connect(address)


def test_another_version_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError(OTHER_VERSION)

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray_cluster, "_reach", lambda address: None)
    with pytest.raises(InputError, match=r"has Ray 2\.55\.0 and Python 3\.12\.1, and here are Ray"):
        ray_cluster.connect("head:6379")


def test_a_worker_that_does_not_see_the_model_says_where(tmp_path: Path) -> None:
    actor = Actor(Placement(workers=1, threads=1, gpus=0))
    spec = ModelSpec(files=LocalFiles(tmp_path / "base"))
    with pytest.raises(InputError, match="every machine of the cluster finds it") as refused:
        actor.begin(spec, [])
    assert refused.value.source == tmp_path / "base" and actor.seat().node in str(refused.value)
