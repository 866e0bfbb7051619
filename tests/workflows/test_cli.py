from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from memedit.errors import GateError, InputError, LockError, NumericalError
from memedit.progress import Progress
from workflows import settings
from workflows.cli import ACTIONS, cli, run
from workflows.command_help import GROUPS, JobOption
from workflows.jobfile import load_job
from workflows.settings import PublishJob

Result = Mapping[str, Any]


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Put a function behind a command; the list it gives receives the jobs."""

    def put(command: str, answer: Callable[[Any, Progress], Result] | None = None) -> list[Any]:
        jobs: list[Any] = []

        def called(job: Any, progress: Progress) -> Result:
            jobs.append(job)
            return answer(job, progress) if answer else {"ok": True}

        module, _, name = ACTIONS[command].run.partition(":")
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, called)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return jobs

    return put


EDIT = ["edit", "--facts", "f.jsonl", "--out", "o"]


def test_flags_reach_the_job(behind: Callable[..., list[Any]], tmp_path: Path) -> None:
    jobs = behind("edit")
    config = tmp_path / "job.yaml"
    config.write_text("facts: f.jsonl\nout: o\ndtype: bfloat16\nseed: 1\ntargets: {lr: 0.1}\n")
    arguments = ["edit", "--config", str(config), "--json", "--seed", "2", "--layers", "5-7"]
    arguments += ["--gate", "score>=80", "--gate", "drift_kl<1", "--on-bad-row", "skip"]
    arguments += ["--set", "targets.steps=3", "--gpus-per-worker", "0.5", "--run-id", "night-1"]
    assert run(arguments) == 0
    (job,) = jobs
    assert job == settings.EditJob(
        json=True,
        facts=str(tmp_path / "f.jsonl"),
        out=str(tmp_path / "o"),
        dtype="bfloat16",
        seed=2,
        layers=(5, 6, 7),
        gate=("score>=80", "drift_kl<1"),
        on_bad_row="skip",
        gpus_per_worker=0.5,
        run_id="night-1",
        targets={"lr": 0.1, "steps": 3},
    )


def test_positional_texts_reach_the_job(behind: Callable[..., list[Any]]) -> None:
    jobs = behind("generate", lambda job, progress: {"continuations": []})
    assert run(["generate", "--model", "m", "--tokens", "3", "one text", "another"]) == 0
    assert (jobs[0].prompts, jobs[0].tokens, jobs[0].model) == (("one text", "another"), 3, "m")


RUNS: dict[str, list[str]] = {
    "edit": EDIT,
    "stats": ["stats", "--out", "o"],
    "evaluate": ["evaluate", "--facts", "f"],
    "compare": ["compare", "--facts", "f", "--out", "o"],
    "tune": ["tune", "--facts", "f", "--out", "o"],
    "trace": ["trace", "--facts", "f", "--out", "o"],
    "generate": ["generate", "a text"],
    "plan": ["plan", "--facts", "f"],
    "apply": ["apply", "d", "--out", "o"],
    "ingest": ["ingest", "--registry", "r", "--set", "source.path=drop"],
}


@pytest.mark.parametrize("command", RUNS)
def test_a_run_has_a_name_of_its_own(command: str, behind: Callable[..., list[Any]]) -> None:
    jobs = behind(command)
    arguments = [*RUNS[command], "--json"]
    assert run(arguments) == run(arguments) == run([*arguments, "--run-id", "mine"]) == 0
    first, second, mine = (job.run_id for job in jobs)
    assert first and second and first != second and mine == "mine"


def test_these_are_the_runs() -> None:
    named = {n for n, action in ACTIONS.items() if "run_id" in fields_of(action.job)}
    assert named == RUNS.keys()


def fields_of(job: type[settings.Job]) -> set[str]:
    return {field.name for field in dataclasses.fields(job)}


PUBLISHING = {name for name, action in ACTIONS.items() if issubclass(action.job, PublishJob)}


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        *((command, "registry" if command in PUBLISHING else None) for command in ACTIONS),
        *((command, "out") for command in sorted(PUBLISHING)),
    ],
)
def test_every_flag_is_a_field_of_the_job_file(
    command: str, left_out: str | None, tmp_path: Path
) -> None:
    """By name, and by value: what a flag can say, the file can say.

    Where two exclude each other, one of them is left out.
    """
    kind = ACTIONS[command].job
    fields = {f.name: f for f in dataclasses.fields(kind)}
    flags = [p for p in cli.commands[command].params if p.name not in ("config", "assignments")]
    assert {p.name for p in flags} == {n for n, f in fields.items() if f.metadata["flag"]}
    flags = [p for p in flags if p.name != left_out]
    samples: dict[str, Any] = {
        "json": True, "debug": True, "full": True, "log_format": "json", "executor": "ray",
        "dtype": "float16", "on_bad_row": "skip", "method": "memit", "gate": ["score>=1"],
        "layers": "3-4", "seed": 4, "workers": 2, "gpus_per_worker": 1.0, "tokens": 5,
        "attempts": 4, "stall_timeout_s": 60.0,
        "matrix_gflops": 50.0, "keep": 3, "limit": 7, "keep_days": 1.5, "run": True, "remove": True,
        "quick": True, "format": "lora", "lora_rank": 16,
        "name": "night-1", "follow": True,
        "methods": "memit,rome", "edits": "1,2", "pairs": 4,
        "trials": 5, "budget_s": 60.0, "objective": "efficacy", "search": "lam,lr",
        "prompts": ["a", "b"], "address": "auto", "device": "cpu", "run_id": "x",
        "conflicts": "refuse", "most_retracted": 1.5, "judged_new": 3, "judged_all": 3,
        "mode": "sequential", "dry_run": True, "every": "0 2 * * *", "time_zone": "Europe/Berlin",
    }  # fmt: skip
    unseen = {}
    if command == "ingest":
        samples["on_bad_row"], unseen = "fail", {"source": {"path": "/drop"}}
    given = {name: samples.get(name, f"/{name}") for name in {p.name for p in flags}}
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump({**given, **unseen}))
    from_file = load_job(kind, config=config)
    config.write_text(yaml.safe_dump(unseen))
    arguments = [command]
    for parameter in flags:
        value = given[parameter.name]
        if isinstance(parameter, click.Argument):
            continue
        for each in value if isinstance(value, list) else [value]:
            arguments += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    for parameter in flags:
        if isinstance(parameter, click.Argument):
            value = given[parameter.name]
            arguments += value if isinstance(value, list) else [value]
    context = cli.commands[command].make_context(command, arguments[1:])
    parsed = {k: v for k, v in context.params.items() if k not in ("config", "assignments")}
    assert load_job(kind, config=config, flags=parsed) == from_file
    assert all(
        getattr(from_file, n) != fields[n].default for n in given if n not in ("method", "device")
    )


@pytest.mark.parametrize("command", ACTIONS)
def test_help_is_good_enough_to_work_from(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    for parameter in cli.commands[command].params:
        if isinstance(parameter, JobOption):
            assert parameter.opts[0] in text
            assert parameter.group in GROUPS
    assert text.strip().splitlines()[-1].strip() == ACTIONS[command].examples[-1]


def test_the_examples_in_the_help_are_right(behind: Callable[..., list[Any]]) -> None:
    import shlex

    for action in ACTIONS.values():
        for example in action.examples:
            program, command, *arguments = shlex.split(example)
            assert program == "memedit"
            context = cli.commands[command].make_context(command, arguments)
            flags = {k: v for k, v in context.params.items() if k not in ("config", "assignments")}
            if context.params["config"] is None:
                load_job(ACTIONS[command].job, flags=flags)


def test_json_is_one_object_whatever_the_libraries_print(
    behind: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(job: Any, progress: Progress) -> Result:
        print("a library speaks")
        warnings.warn("and warns", stacklevel=1)
        progress.message("we too")
        return {"metrics": {"score": float("nan")}, "out": Path("o"), "layers": (1, 2)}

    behind("edit", chatty)
    assert run([*EDIT, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"metrics": {"score": None}, "out": "o", "layers": [1, 2]}
    assert "a library speaks" in told.err
    assert "and warns" in told.err


def test_a_json_log_stays_json(
    behind: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def warns(job: Any, progress: Progress) -> Result:
        progress.start("stats", total=1)
        warnings.warn("careful", stacklevel=1)
        raise NumericalError("NaN in layer 5")

    behind("edit", warns)
    assert run([*EDIT, "--log-format", "json", "--run-id", "night-1"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert any("careful" in line.get("message", "") for line in lines)
    assert {line["run_id"] for line in lines} == {"night-1"}
    assert lines[-1]["level"] == "error"
    assert lines[-1]["message"] == "NaN in layer 5"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericalError("NaN"), 1),
        (InputError("no such layer", source="job.yaml", field="layers"), 2),
        (GateError("score is 70"), 3),
        (LockError("held by another run"), 4),
        (KeyboardInterrupt(), 1),
        (RuntimeError("out of memory\nsecond line"), 1),
    ],
)
def test_exit_codes(
    behind: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def fail(job: Any, progress: Progress) -> Result:
        raise error

    behind("edit", fail)
    assert run([*EDIT, "--json"]) == code
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["exit_code"] == code
    assert "Traceback" not in told.err
    assert "second line" not in told.err
    assert "memedit: " in told.err


def test_debug_shows_where(
    behind: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: Any, progress: Progress) -> Result:
        raise RuntimeError("broken")

    behind("edit", fail)
    assert run([*EDIT, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["edit"],
        ["edit", "--facts", "f"],
        [*EDIT, "--registry", "r"],
        ["apply", "d"],
        ["apply", "d", "--out", "o", "--registry", "r"],
        ["edit", "--fact", "f"],
        ["nothing"],
        [*EDIT, "--executor", "rey"],
        [*EDIT, "--seed", "x"],
        [*EDIT, "--set", "targets.stepz=3"],
        [*EDIT, "--gate", "score>>80"],
        [*EDIT, "--config", "none.yaml"],
        ["generate"],
        ["verify"],
        ["verify", "no-such-folder"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_calls_nothing(
    behind: Callable[..., list[Any]], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = behind("edit") if arguments[0] == "edit" else []
    assert run([*arguments, "--json"]) == 2
    told = capsys.readouterr()
    assert not jobs
    assert told.err.startswith("memedit: ")
    assert json.loads(told.out)["error"]["exit_code"] == 2


def test_wrong_usage_is_json_in_a_json_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["edit", "--log-format", "json", "--nothing"]) == 2
    assert "--nothing" in json.loads(capsys.readouterr().err)["message"]


def test_a_result_that_is_not_ok_is_exit_code_1(behind: Callable[..., list[Any]]) -> None:
    behind("verify", lambda job, progress: {"ok": False, "version": "v", "problems": []})
    assert run(["verify", "v"]) == 1


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = (
        "import sys; from workflows.cli import run; run(['edit', '--help']);"
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_sigterm_runs_the_finally_blocks(tmp_path: Path) -> None:
    (tmp_path / "slow_edit.py").write_text(
        "import sys, time, types\n"
        "def run_edit(job, progress):\n"
        "    try:\n"
        "        open('started', 'w').close()\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        open('cleaned', 'w').close()\n"
        "sys.modules['workflows.edit'] = sys.modules[__name__]\n"
        "from workflows.cli import main\n"
        "main(['edit', '--facts', 'f', '--out', 'o'])\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "slow_edit.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert (tmp_path / "cleaned").exists()
    assert "run the same command again" in told
    assert "Traceback" not in told


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    root = Path(__file__).parents[2]
    command = f"{sys.executable} -m workflows.cli doctor --help | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr
