"""The command line: parse, call, exit code.

Every flag is a field of the command's job (`workflows.settings`); the work is behind one function a
command, imported when it is called, so that `--help` answers at once. Progress and logs go to
stderr, the result to stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

import memedit
from memedit.errors import InputError, MemeditError
from workflows import render_settings, settings, submit_settings, version_settings
from workflows.command_help import JobCommand, flags_of
from workflows.ingestion import settings as ingestion_settings
from workflows.jobfile import load_job
from workflows.render_command import RENDER_EXAMPLES, RENDER_SUMMARY, render_command
from workflows.submit_command import EXAMPLES, SUMMARY, submit_command
from workflows.wording import without_keys


@dataclass(frozen=True, kw_only=True)
class Action:
    """What stands behind a command: `run` is called with the job and a progress receiver.

    It gives a mapping, or an object whose `summary()` is one; `show` draws it for people. A result
    that says `"ok": false` makes the exit code 1.
    """

    job: type[settings.Job]
    run: str
    """`module:function`."""
    show: str
    """Function of `workflows.results`."""
    summary: str
    examples: tuple[str, ...]


ACTIONS: dict[str, Action] = {
    "edit": Action(
        job=settings.EditJob,
        run="workflows.edit:run_edit",
        show="show_edit",
        summary="Write facts into a model: a patched checkpoint, its evaluation, a report.",
        examples=(
            "memedit edit --model smollm2 --facts examples/facts.jsonl --out runs/demo",
            "memedit edit --config job.yaml --set targets.steps=15 --gate 'score>=80' --json",
        ),
    ),
    "stats": Action(
        job=settings.StatsJob,
        run="workflows.stats:run_stats",
        show="show_plan",
        summary="Collect the second moments only, for later edits.",
        examples=(
            "memedit stats --corpus corpus.parquet --layers 5-9 --out stats",
            "memedit edit --stats stats --facts facts.jsonl --out runs/first",
        ),
    ),
    "evaluate": Action(
        job=settings.EvaluateJob,
        run="workflows.evaluate:run_evaluate",
        show="show_metrics",
        summary="The metrics of a checkpoint on a fact table.",
        examples=(
            "memedit evaluate --model runs/demo --facts examples/facts.jsonl",
            "memedit evaluate --model runs/demo --base smollm2 --facts facts.jsonl --json",
        ),
    ),
    "generate": Action(
        job=settings.GenerateJob,
        run="workflows.generate:run_generate",
        show="show_continuations",
        summary="Greedy continuations, to try a model.",
        examples=('memedit generate --model runs/demo "The Eiffel Tower is located in"',),
    ),
    "plan": Action(
        job=settings.PlanJob,
        run="workflows.plan:run_plan",
        show="show_plan",
        summary="What `edit` would do: layers, shards, memory, operations, time; runs nothing.",
        examples=("memedit plan --facts facts.jsonl --layers 5-9",),
    ),
    "verify": Action(
        job=version_settings.VerifyJob,
        run="workflows.verify:run_verify",
        show="show_problems",
        summary="Check a published version against its manifest and its base; reads every byte.",
        examples=(
            "memedit verify runs/demo",
            "memedit verify s3://models/capitals/versions/20261125T040000Z-1a2b --quick",
        ),
    ),
    "apply": Action(
        job=version_settings.ApplyJob,
        run="workflows.apply:run_apply",
        show="show_plan",
        summary="Add a published delta to its base model: the full checkpoint.",
        examples=(
            "memedit edit --facts facts.jsonl --format delta --out runs/delta",
            "memedit apply runs/delta --out runs/full",
        ),
    ),
    "history": Action(
        job=version_settings.HistoryJob,
        run="workflows.registry:run_history",
        show="show_history",
        summary="The versions of a registry, and which of them is CURRENT.",
        examples=("memedit history --registry runs/registry",),
    ),
    "show": Action(
        job=version_settings.ShowJob,
        run="workflows.registry:run_show",
        show="show_version",
        summary="What a version is made of, and its metrics; CURRENT if none is named.",
        examples=(
            "memedit show runs/demo",
            "memedit show 20261125T04 --registry s3://models/capitals",
        ),
    ),
    "diff": Action(
        job=version_settings.DiffJob,
        run="workflows.registry:run_diff",
        show="show_diff",
        summary="What is new in one version against another: facts, updates, metrics, settings.",
        examples=(
            "memedit diff --registry runs/registry",
            "memedit diff previous current --registry runs/registry",
            "memedit diff runs/first runs/second --json",
        ),
    ),
    "rollback": Action(
        job=version_settings.RollbackJob,
        run="workflows.registry:run_rollback",
        show="show_rollback",
        summary="Use an earlier version: move CURRENT to it, if it is whole.",
        examples=(
            "memedit rollback --registry runs/registry",
            "memedit rollback --registry runs/registry --to 20261125T04",
        ),
    ),
    "pin": Action(
        job=version_settings.PinJob,
        run="workflows.registry:run_pin",
        show="show_pin",
        summary="Keep a version, whatever gc is told.",
        examples=("memedit pin current --registry runs/registry --why 'in the paper'",),
    ),
    "gc": Action(
        job=version_settings.GcJob,
        run="workflows.registry:run_gc",
        show="show_gc",
        summary="Remove old versions and what killed runs left; without --run only says so.",
        examples=(
            "memedit gc --registry runs/registry --keep 5 --keep-days 30",
            "memedit gc --registry runs/registry --run",
        ),
    ),
    "ingest": Action(
        job=ingestion_settings.IngestJob,
        run="workflows.ingest:run_ingest",
        show="show_ingest",
        summary="One scheduled run: make the model say what a table of facts says.",
        examples=(
            "memedit ingest --config ingest.yaml --dry-run",
            "memedit ingest --config ingest.yaml --json",
            "memedit ingest --config ingest.yaml --every '0 2 * * *' --time-zone Europe/Berlin",
        ),
    ),
    "compact": Action(
        job=ingestion_settings.CompactJob,
        run="workflows.compact:run_compact",
        show="show_plan",
        summary="Make the version in use a base of its own; its facts become part of the weights.",
        examples=("memedit compact --registry runs/registry --out bases/2026-11",),
    ),
    "status": Action(
        job=submit_settings.StatusJob,
        run="workflows.submit:run_status",
        show="show_status",
        summary="What the runs on a Ray cluster are doing: all of memedit, or one.",
        examples=(
            "memedit status --address http://head:8265",
            "memedit status night-1 --address http://head:8265 --json",
        ),
    ),
    "logs": Action(
        job=submit_settings.LogsJob,
        run="workflows.submit:run_logs",
        show="show_log",
        summary="What a run on a Ray cluster has written, on stdout.",
        examples=("memedit logs night-1 --follow --address http://head:8265",),
    ),
    "stop": Action(
        job=submit_settings.StopJob,
        run="workflows.submit:run_stop",
        show="show_stopped",
        summary="End a run on a Ray cluster cleanly; submitted again, it goes on.",
        examples=("memedit stop night-1 --address http://head:8265",),
    ),
    "doctor": Action(
        job=settings.DoctorJob,
        run="workflows.doctor:run_doctor",
        show="show_checks",
        summary="What is installed, reachable and missing, with the remedy.",
        examples=("memedit doctor", "memedit doctor --full"),
    ),
}


def _command(name: str, action: Action) -> click.Command:
    def callback(config: Path | None, assignments: tuple[str, ...], **flags: Any) -> None:
        job = load_job(action.job, config=config, flags=flags, assignments=assignments)
        if getattr(job, "run_id", "") is None:  # every run has a name, in its log too
            unnamed: Any = job
            job = replace(unnamed, run_id=settings.new_run_id())
        _act(action, job)

    return JobCommand(
        name=name,
        job=action.job,
        callback=callback,
        params=flags_of(action.job),
        help=action.summary,
        short_help=action.summary,
        examples=action.examples,
    )


def _act(action: Action, job: settings.Job) -> None:
    """Do what a command does and tell the result."""
    context = click.get_current_context()
    context.obj.take(job)
    result = _perform(action, job, context.obj.run_id)
    if not job.json:
        _function(f"workflows.results:{action.show}")(result, sys.stdout)
    summary = _plain(result if isinstance(result, Mapping) else result.summary())
    if job.json:
        click.echo(json.dumps(summary, ensure_ascii=False, allow_nan=False))
    if summary.get("ok") is False:
        context.exit(summary.get("exit_code") or 1)


@dataclass
class _Reporting:
    """How an error is told; known in full only once the job is read."""

    json: bool
    json_log: bool
    debug: bool
    run_id: str = ""

    def take(self, job: settings.Job) -> None:
        self.json, self.debug = job.json, job.debug
        self.json_log = job.log_format == "json"
        self.run_id = getattr(job, "run_id", "")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(memedit.__version__, prog_name="memedit")
def cli() -> None:
    """Batch editing of language models with MEMIT: facts in, a patched checkpoint out.

    Begin with `memedit doctor`, then `memedit edit --help`.

    Exit codes: 0 done; 1 failed while running; 2 the input or the settings are wrong (nothing was
    written); 3 a gate was not met (nothing was published); 4 another run holds the lock.
    """


FACTS: dict[str, Action] = {
    "list": Action(
        job=ingestion_settings.FactsListJob,
        run="workflows.fact_commands:run_list",
        show="show_facts",
        summary="The facts of a registry, and the state of each.",
        examples=(
            "memedit facts list --registry runs/registry",
            "memedit facts list --registry runs/registry --state any --contains Eiffel --json",
        ),
    ),
    "add": Action(
        job=ingestion_settings.FactsAddJob,
        run="workflows.fact_commands:run_add",
        show="show_changed_facts",
        summary="Add facts by hand; the next ingestion publishes them.",
        examples=("memedit facts add --registry runs/registry fixes.jsonl",),
    ),
    "retract": Action(
        job=ingestion_settings.FactsChangeJob,
        run="workflows.fact_commands:run_retract",
        show="show_changed_facts",
        summary="Take facts out; with the next ingestion they disappear from the model.",
        examples=("memedit facts retract --registry runs/registry 17 42 --why 'wrong source'",),
    ),
    "restore": Action(
        job=ingestion_settings.FactsChangeJob,
        run="workflows.fact_commands:run_restore",
        show="show_changed_facts",
        summary="Let facts count again that were retracted by hand, or quarantined.",
        examples=("memedit facts restore --registry runs/registry 17",),
    ),
    "why": Action(
        job=ingestion_settings.FactsWhyJob,
        run="workflows.fact_commands:run_why",
        show="show_why",
        summary="Where a fact is from, what became of it, and which versions say it.",
        examples=(
            "memedit facts why --registry runs/registry 17",
            "memedit facts why --registry runs/registry 'Eiffel Tower'",
        ),
    ),
    "rejects": Action(
        job=ingestion_settings.FactsRejectsJob,
        run="workflows.fact_commands:run_rejects",
        show="show_rejects",
        summary="The rows that no fact was made of, and why.",
        examples=(
            "memedit facts rejects --registry runs/registry",
            "memedit facts rejects --registry runs/registry --out inbox/mended.jsonl",
        ),
    ),
}
SUBMIT = Action(
    job=submit_settings.SubmitJob,
    run="workflows.submit:run_submit",
    show="show_submitted",
    summary=SUMMARY,
    examples=EXAMPLES,
)
RENDER = Action(
    job=render_settings.RenderJob,
    run="workflows.render:run_render",
    show="show_rendered",
    summary=RENDER_SUMMARY,
    examples=RENDER_EXAMPLES,
)

for _name, _action in ACTIONS.items():
    cli.add_command(_command(_name, _action))
_facts = click.Group(
    name="facts",
    help="The facts of a registry: what the model should say from the next ingestion on.",
    short_help="The facts of a registry: list, add, retract, restore, why, rejects.",
)
for _name, _action in FACTS.items():
    _facts.add_command(_command(_name, _action))
cli.add_command(_facts)
cli.add_command(submit_command(lambda job: _act(SUBMIT, job)))
cli.add_command(render_command(lambda job: _act(RENDER, job)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; gives the exit code. Errors are told here, and nowhere else."""
    reporting = _Reporting(
        json="--json" in arguments,
        json_log="--log-format=json" in "=".join(arguments),
        debug="--debug" in arguments,
    )
    try:
        with _interrupted_by_sigterm():
            code = cli.main(list(arguments), "memedit", standalone_mode=False, obj=reporting)
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        usage = f"\n{error.ctx.get_usage()}\nTry --help." if error.ctx else ""
        return _fail(reporting, "InputError", f"{error.format_message()}{usage}", 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail(reporting, "Stopped", "stopped; run the same command again to go on", 1)
    except BrokenPipeError:
        # Whoever read stdout has gone; keep Python from failing again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemeditError as error:
        _trace(reporting)
        return _fail(reporting, type(error).__name__, str(error), error.exit_code, error)
    except Exception as error:  # the border of the program: whatever it is, say it in one line
        _trace(reporting)
        first = next(iter(str(error).strip().splitlines()), "")
        hint = "" if reporting.debug else " (--debug shows where)"
        return _fail(
            reporting, type(error).__name__, f"{type(error).__name__}: {first}{hint}", 1, error
        )


def _fail(
    reporting: _Reporting, kind: str, message: str, code: int, error: Exception | None = None
) -> int:
    message = without_keys(message)
    if reporting.json:
        place = error if isinstance(error, InputError) else None
        told: dict[str, Any] = {"kind": kind, "message": message, "exit_code": code}
        if place is not None:
            told |= {"row": place.row, "field": place.field}
            told["source"] = None if place.source is None else without_keys(str(place.source))
        click.echo(json.dumps({"error": told}, ensure_ascii=False))
    if reporting.json_log:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": "error", "event": "failed", "message": message}
        line["run_id"] = reporting.run_id
        click.echo(json.dumps(line, ensure_ascii=False), err=True)
    else:
        click.echo(f"memedit: {message}", err=True)
    return code


def _trace(reporting: _Reporting) -> None:
    if reporting.debug:
        click.echo(without_keys(traceback.format_exc()), err=True, nl=False)


def _perform(action: Action, job: settings.Job, run_id: str) -> Any:
    """Call the function behind a command, with progress on stderr and nothing else on stdout."""
    _quieten()
    function = _function(action.run)
    from workflows.progress import progress_for

    with (
        contextlib.redirect_stdout(sys.stderr),
        progress_for(job.log_format, sys.stderr, run_id) as progress,
        _warnings_to(progress.message),
    ):
        if getattr(job, "executor", "inline") == "ray":
            from cluster.ray_metrics import Metered

            return function(job, Metered(progress, run_id))
        return function(job, progress)


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _quieten() -> None:
    """Keep the bars and hints of the libraries out of our logs, unless somebody asked for them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextlib.contextmanager
def _warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Python warnings become messages of the run, so that a JSON log stays JSON."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        tell(f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end a run as Ctrl-C does: through the `finally` blocks."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plain(value: Any) -> Any:
    """`value` as JSON has it: paths as texts, a number that is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
