"""Input for whole commands over object storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.worlds import Place, World, write_input
from tests.s3.objects import Objects
from tests.s3.server import SeaweedServer
from tests.workflows.runs import without_plots


@pytest.fixture(scope="session")
def input_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_input(tmp_path_factory.mktemp("input"))


@pytest.fixture
def world(
    input_folder: Path, s3: str, s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    without_plots(monkeypatch)
    objects = Objects(s3_server)
    objects.put_folder(input_folder, f"{s3}/input")
    yield World(
        here=Place(root=str(input_folder)), there=Place(root=f"{s3}/input"), objects=objects
    )
    objects.clear(s3)
