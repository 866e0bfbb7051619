"""A Ray cluster of two machines with a link between them that can be cut.

Each machine is a network namespace of its own; nothing outside them reaches either.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.processes import comes_true, processes_with
from tests.cluster.s3_places import child_environment
from tests.integration.ray_head import BIN

_HEAD, OTHER = "10.213.77.1", "10.213.77.2"
ADDRESS = f"{_HEAD}:6379"
GIVEN_UP_S = 6
"""After about as long a machine that does not answer counts as lost; Ray's own is a minute."""
_LINK = "cable"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(kw_only=True)
class Machines:
    """The head and the other one."""

    folder: Path
    environment: Mapping[str, str]
    names: tuple[str, str]
    logs: list[Path] = field(default_factory=list)

    def start(self, command: Sequence[str], *, at: int, log: str) -> subprocess.Popen[bytes]:
        """Run something on one of them; what it says goes into a file of the folder."""
        self.logs.append(self.folder / log)
        with self.logs[-1].open("w") as stream:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[at], *command],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", _LINK, "down")

    def mend(self) -> None:
        """The link is there again."""
        _ip("-n", self.names[0], "link", "set", _LINK, "up")

    def join(self) -> subprocess.Popen[bytes]:
        """Let the other machine join the cluster, for the first time or again."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        options = [f"--address={ADDRESS}", f"--node-ip-address={OTHER}"]
        return self._ray(*options, f"--temp-dir={folder}", at=1, log=f"{folder.name}.log")

    def lead(self) -> subprocess.Popen[bytes]:
        """Start the head."""
        options = ["--head", "--port=6379", f"--node-ip-address={_HEAD}"]
        options += ["--include-dashboard=false", f"--temp-dir={self.folder / 'head'}"]
        return self._ray(*options, at=0, log="head.log")

    def _ray(self, *options: str, at: int, log: str) -> subprocess.Popen[bytes]:
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        return self.start([*command, *options], at=at, log=log)

    def alive(self) -> int:
        """How many machines Ray knows of that are alive."""
        code = f"import ray; ray.init('{ADDRESS}'); print(sum(n['Alive'] for n in ray.nodes()))"
        asked = self.start([sys.executable, "-c", code], at=0, log="alive.log")
        asked.wait(60)
        last = self.logs[-1].read_text().split()[-1:]
        return int(last[0]) if asked.returncode == 0 else 0

    def told(self) -> str:
        """What all processes have said, for a test that fails."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.logs)


@contextmanager
def linked_machines() -> Iterator[Machines]:
    """Two linked machines without Ray; ends all that was started on them.

    Skips the test where this process may not make network namespaces.
    """
    # Not pytest's folder: the path of a socket has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="memedit-link-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        names = _namespaces(stack, folder.name)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        outside = {k: v for k, v in child_environment().items() if not k.startswith("RAY_")}
        environment = {
            **outside,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": str(GIVEN_UP_S // 3),
            "OMP_NUM_THREADS": "1",
        }
        stack.callback(_end, str(token))
        yield Machines(folder=folder, environment=environment, names=names)


def _namespaces(stack: ExitStack, name: str) -> tuple[str, str]:
    names = f"{name}-1", f"{name}-2"
    try:
        for each in names:
            _ip("netns", "add", each)
            stack.callback(_ip, "netns", "delete", each)
        peer = ["peer", "name", _LINK, "netns", names[1]]
        _ip("-n", names[0], "link", "add", _LINK, "type", "veth", *peer)
        for each, address in zip(names, (_HEAD, OTHER), strict=True):
            _ip("-n", each, "address", "add", f"{address}/24", "dev", _LINK)
            for interface in ("lo", _LINK):
                _ip("-n", each, "link", "set", interface, "up")
        subprocess.run(
            ["ip", "netns", "exec", names[0], "true"], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no command ip, which makes network namespaces")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    return names


def _end(token: str) -> None:
    """All processes on the machines have the path of the token in their environment."""
    for process in processes_with(token):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert comes_true(lambda: not processes_with(token), within_s=10)
