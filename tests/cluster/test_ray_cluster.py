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


def test_auto_is_reached_before_ray_tries_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("not asked first"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match=r"reached at 127\.0\.0\.1:1 .*refused"):
        ray_cluster.connect("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    here: set[str] = set()
    found = lambda: here  # noqa: E731
    found.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", found)
    with pytest.raises(InputError, match=r"reached at auto .*RAY_ADDRESS"):
        ray_cluster.connect("auto")
    here.add("127.0.0.1:2")
    with pytest.raises(InputError, match=r"reached at 127\.0\.0\.1:2 .*refused"):
        ray_cluster.connect("auto")


@pytest.mark.parametrize(
    ("told", "hint"),
    [
        (OTHER_VERSION, r"has Ray 2\.55\.0 and Python 3\.12\.1, and here are Ray"),
        ("Version mismatch: 2.55.0\nis not 2.60.0", "Version mismatch: 2.55.0 is not 2.60.0"),
    ],
)
def test_another_version_says_which(told: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray_cluster, "_reach", lambda address: None)
    with pytest.raises(InputError, match=hint):
        ray_cluster.connect("head:6379")


def test_a_worker_that_does_not_see_the_model_says_where(tmp_path: Path) -> None:
    actor = Actor(Placement(workers=1, threads=1, gpus=0))
    spec = ModelSpec(files=LocalFiles(tmp_path / "base"))
    with pytest.raises(InputError, match="every machine of the cluster finds it") as refused:
        actor.begin(spec, [])
    assert refused.value.source == tmp_path / "base" and actor.seat().node in str(refused.value)
