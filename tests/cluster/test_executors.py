"""Opening an executor: what is imported, what the environment gets, what cannot be reached."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.executors import open_executor, prepare_ray
from memedit.errors import InputError
from memedit.executor import InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from tests.tiny import save_tiny

NOWHERE = ModelSpec(files=LocalFiles(Path("/nonexistent")))
PREPARED = {
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "RAY_prestart_worker_first_driver",
}


@pytest.mark.slow
def test_inline_runs_import_no_ray(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from cluster.executors import open_executor\n"
        "from memedit.files import LocalFiles\n"
        "from memedit.model import ModelSpec\n"
        "spec = ModelSpec(files=LocalFiles(Path(sys.argv[1])))\n"
        "with open_executor('inline', spec, threads=1): pass\n"
        "assert 'ray' not in sys.modules\n"
        "assert not any(name.startswith('RAY_') for name in __import__('os').environ)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    folder = str(save_tiny(tmp_path / "model"))
    subprocess.run([sys.executable, "-c", program, folder], check=True, env=environment)


def test_inline_is_this_process(tmp_path: Path) -> None:
    with open_executor(
        "inline", ModelSpec(files=LocalFiles(save_tiny(tmp_path / "model")))
    ) as executor:
        assert isinstance(executor, InlineExecutor)


def test_a_local_ray_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PREPARED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_ray(local=False)
    assert not PREPARED & os.environ.keys()  # what a cluster asks for is the user's to set
    prepare_ray(local=True)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    prepare_ray(local=True)
    assert os.environ["RAY_AUTH_TOKEN"] == token


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/some/where"}
    monkeypatch.setattr(os, "environ", dict(settings))
    prepare_ray(local=True)
    assert settings.items() <= os.environ.items()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.ray
@pytest.mark.slow
class TestUnreachable:
    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        for form in (address, f"ray://{address}"):
            error = _refused(form, within_s=10)
            assert address in str(error)
            assert "check that it runs" in str(error)

    def test_something_else_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Ray takes another address of the machine where it is told 127.0.0.1.
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as server:
            error = _refused(f"127.0.0.1:{server.getsockname()[1]}", within_s=20)
        assert "is not Ray" in str(error)

    def test_no_cluster_on_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_TMPDIR", "/nonexistent")
        assert "auto" in str(_refused("auto", within_s=20))

    @pytest.mark.parametrize("address", ["nonsense", "host:", "host:port", "http://"])
    def test_no_address(self, address: str) -> None:
        assert "HOST:PORT" in str(_refused(address, within_s=5))

    def test_the_address_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "nonsense")
        with pytest.raises(InputError, match="nonsense"):
            open_executor("ray", NOWHERE)


def _refused(address: str, *, within_s: float) -> InputError:
    import cluster.ray_executor  # noqa: F401  # its import is not part of the time

    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        open_executor("ray", NOWHERE, address=address)
    assert time.monotonic() - start < within_s
    assert caught.value.field == "address"
    return caught.value
