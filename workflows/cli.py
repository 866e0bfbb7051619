"""The command line: parse, call, exit code.

Every flag is a field of the command's job (`workflows.settings`); the work is behind one function a
command, imported when it is called, so that `--help` answers at once. Progress and logs go to
stderr, the result to stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
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
from workflows import settings
from workflows.actions import ACTIONS, FACTS, RENDER, SUBMIT, Action
from workflows.command_help import JobCommand, flags_of
from workflows.jobfile import load_job
from workflows.plain import plain
from workflows.render_command import render_command
from workflows.submit_command import submit_command
from workflows.wording import without_keys


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
    summary = plain(result if isinstance(result, Mapping) else result.summary())
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


if __name__ == "__main__":
    main()
