"""docs/operations.md: its commands are commands, its files are there, its sums are right."""

from __future__ import annotations

import re
import shlex
from math import ceil
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cluster import ray_metrics
from workflows.cli import cli

ROOT = Path(__file__).parents[2]
NAME = "memedit-nightly"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Each line of memedit in a block of shell commands, with continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    text = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return re.findall(r"^memedit .*$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("line", commands())
def test_each_command_is_one(line: str) -> None:
    command: click.Command = cli
    words = shlex.split(line, comments=True)[1:]
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    assert context.params


def test_all_that_an_operator_needs_is_shown() -> None:
    names = {line.split()[1] for line in commands()}
    needed = {"plan", "render", "status", "logs", "stop", "history", "rollback", "gc", "verify"}
    assert needed <= names


def test_the_job_file_is_the_example() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    example = yaml.safe_load((ROOT / "examples" / "nightly.yaml").read_text())
    assert yaml.safe_load(shown).items() <= example.items()


def documents() -> list[dict[str, Any]]:
    """What the page hands to kubectl."""
    texts = re.findall(r"<<'YAML'\n(.*?)^YAML$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [each for text in texts for each in yaml.safe_load_all(text)]


def test_every_metric_is_told_and_no_other() -> None:
    there = set(re.findall(r"^\| `(memedit_\w+)` \|", ray_metrics.__doc__ or "", re.MULTILINE))
    assert there and set(re.findall(r"memedit_[a-z_]*[a-z]", PAGE)) == there


def test_the_alerts_ask_for_metrics_that_are_there() -> None:
    kinds = {document["kind"]: document for document in documents()}
    assert {"PersistentVolumeClaim", "PodMonitor", "PrometheusRule"} == set(kinds)
    (group,) = kinds["PrometheusRule"]["spec"]["groups"]
    asked = " ".join(rule["expr"] for rule in group["rules"])
    assert "ray_memedit_done_total" in asked and "ray_memedit_units_total" in asked
    assert f'cronjob="{NAME}"' in asked


def test_every_flag_of_render_that_it_names_is_one() -> None:
    render = cli.commands["render"]
    assert isinstance(render, click.Group)
    flags = {flag for each in render.commands["kubernetes"].params for flag in each.opts}
    for name in ("start-within-s", "deadline-s", "node-selector", "toleration", "retries"):
        assert f"--{name}" in flags and f"`--{name}`" in PAGE


def test_what_it_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


def test_the_table_of_times_is_its_own_arithmetic() -> None:
    """Rounds of units over the GPUs, and what the head does alone."""
    stages = {10_000: (305, 2_570, 231, 2.0), 100_000: (3_160, 25_800, 2_380, 10.9)}

    def seconds(gpus: int, facts: int) -> float:
        evaluation, targets, keys, solve = stages[facts]
        units, batches = ceil(facts / 64), ceil(facts / 12)
        spread = ceil(27 / gpus) * 223 / 27 + 34 / gpus
        spread += ceil(batches / gpus) * targets / batches
        return spread + ceil(units / gpus) * (keys + evaluation) / units + 132 + solve

    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) min \| ([\d.]+) \| (.*) \|$", PAGE, flags=re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == [1, 8, 64, 512]
    for gpus, minutes, hours, rest in rows:
        took = seconds(int(gpus), 10_000)
        assert float(minutes) == pytest.approx(took / 60, rel=0.02)
        assert float(hours) == pytest.approx(took * int(gpus) / 3600, rel=0.04)
        if (found := re.match(r"([\d.]+) min \| ([\d.]+) ", rest)) is not None:
            took = seconds(int(gpus), 100_000)
            assert float(found[1]) == pytest.approx(took / 60, rel=0.03)
            assert float(found[2]) == pytest.approx(took * int(gpus) / 3600, rel=0.02)
