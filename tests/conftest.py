"""What every test can ask for: the data that is not part of the project, and the real model."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

pytest_plugins = ["tests.s3.fixtures"]

# Ray reads these when it is first imported, whichever test does that: it listens on 127.0.0.1 only
# (in spite of the name), and asks for a token.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Tiny models are too small for a second thread, and on a busy machine it only gets in the way.
torch.set_num_threads(1)

# A busy machine is slow now and then, and no test asserts a time.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


_OF_MODULES = ("memedit", "cluster", "workflows")
_ALONE = ("test_s3_kill", "test_s3_faults", "test_s3_traffic", "test_disk_full", "test_cut_link")
"""They count requests, fill disks, or kill at moments that they measure."""


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what must be alone, what may run side by side, and of it the fast tests of modules.

    Ray's tests are neither: one Ray at a time, which waits more than it computes.
    """
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        marks = {mark.name for mark in item.iter_markers()}
        if item.path.stem in _ALONE:
            item.add_marker("alone")
        elif "ray" not in marks:
            item.add_marker("beside")
            if folder in _OF_MODULES and "slow" not in marks:
                item.add_marker("unit")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, `$MEMEDIT_SHARED_DATA` or `../shared/data`; skips without it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEMEDIT_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; MEMEDIT_SHARED_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint folder of the embedded default; fetched and converted on first use."""
    from workflows.models import resolve_model

    folder = resolve_model("smollm2").files.here
    assert folder is not None
    return folder
