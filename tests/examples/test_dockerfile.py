"""The image recipe: read, not built, for there is no registry here."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from workflows.render_settings import RenderKubernetesJob

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what follows it, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in parts]


def arguments(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def copied() -> list[str]:
    """What is copied from the repository."""
    return [
        source
        for rest in arguments("COPY")
        if not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    ]


def test_it_is_made_of_known_instructions() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0] == ("ARG", "PYTHON=3.11") and len(arguments("FROM")) == 2
    for line in arguments("RUN"):
        shlex.split(line)


@pytest.mark.parametrize("path", sorted(set(copied())))
def test_what_is_copied_is_there(path: str) -> None:
    assert (ROOT / path).exists()
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and f"!{path.split('/')[0]}" in ignored


def test_all_that_is_installed_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    needed = {name for name in packages if "." not in name} | {"constraints.txt", "pyproject.toml"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= set(copied())


def test_every_argument_is_used_and_declared() -> None:
    text = DOCKERFILE.read_text()
    declared = {rest.partition("=")[0] for rest in arguments("ARG")}
    assert declared == set(re.findall(r"\$\{(\w+)\}", text)) == {"PYTHON", "TORCH_INDEX"}
    assert any("-c constraints.txt" in line for line in arguments("RUN"))


def test_its_user_is_the_one_of_the_manifests() -> None:
    user = RenderKubernetesJob.__dataclass_fields__["user"].default
    assert arguments("USER") == [str(user)] != ["0"]
    assert any(f"--uid {user} " in line for line in arguments("RUN"))


def test_stages_that_are_copied_from_are_there() -> None:
    stages = set(re.findall(r" AS (\w+)", "\n".join(arguments("FROM"))))
    assert set(re.findall(r"--from=(\w+)", "\n".join(arguments("COPY")))) == stages == {"build"}
