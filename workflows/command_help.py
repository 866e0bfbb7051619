"""From the fields of a job to the flags of a command and a help text to work from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from workflows.fields import SECTIONS
from workflows.settings import Job

GROUPS = ("Input", "Output", "Model", "Method", "Machine", "Checks", "Reporting")
"""The headings of `--help`, in order."""


def flags_of(job: type[Job]) -> list[click.Parameter]:
    """The flags and arguments of a job's command: one a field, then `--config` and `--set`."""
    parameters: list[click.Parameter] = []
    hints = typing.get_type_hints(job)
    for field in dataclasses.fields(job):
        if field.metadata["positional"]:
            many = typing.get_origin(hints[field.name]) is tuple
            parameters.append(
                click.Argument(
                    [field.name],
                    nargs=-1 if many else 1,
                    required=False,  # it may stand in the job file
                    metavar=field.metadata["metavar"],
                )
            )
        elif field.metadata["flag"]:
            parameters.append(_flag(field, hints[field.name]))
    parameters.append(
        JobOption(
            ["--config"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="YAML job file: any flag by its name (on-bad-row is on_bad_row), and the"
            " sections below. Flags win.",
            group="Input",
        )
    )
    if any(name in SECTIONS for name in hints):
        parameters.append(
            JobOption(
                ["--set", "assignments"],
                multiple=True,
                metavar="SECTION.FIELD=VALUE",
                help="Set any field, the value read as YAML; wins over all else; repeatable.",
                group="Method",
            )
        )
    else:
        parameters.append(
            JobOption(
                ["--set", "assignments"],
                multiple=True,
                metavar="FIELD=VALUE",
                help="Set any field, the value read as YAML; wins over all else; repeatable.",
                group="Input",
            )
        )
    return parameters


def _flag(field: dataclasses.Field[Any], hint: Any) -> JobOption:
    metadata = field.metadata
    name = f"--{field.name.replace('_', '-')}"
    text = metadata["help"]
    choices = [c for h in (hint, *typing.get_args(hint)) for c in _literals(h)]
    if metadata["required"]:
        text += " [required]"
    elif field.default not in (None, (), False) and field.default is not dataclasses.MISSING:
        text += f" [default: {field.default}]"
    if hint is bool:
        return JobOption(
            [name],
            is_flag=True,
            default=None,
            help=text,
            group=metadata["group"],
        )
    return JobOption(
        [name, field.name],
        multiple=typing.get_origin(hint) is tuple,
        default=None,
        metavar="|".join(choices) if choices else metadata["metavar"],
        help=text,
        group=metadata["group"],
    )


def _literals(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


class JobOption(click.Option):
    """A flag that knows its heading in the help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class JobCommand(click.Command):
    """A command whose help groups the flags, lists the sections and ends with examples."""

    def __init__(self, *args: Any, job: type[Job], examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.job = job
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The flags by group, then the fields of the sections."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for field in dataclasses.fields(self.job):
            if field.metadata["positional"]:  # click has no help for arguments
                needed = " [required]" if field.metadata["required"] else ""
                text = f"{field.metadata['help']}{needed}"
                rows[field.metadata["group"]].append((field.metadata["metavar"], text))
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows[getattr(parameter, "group", "Reporting")].append(record)
        for records in rows.values():
            records.sort(key=lambda record: "[required]" not in record[1])
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records, col_max=34)
        sections = [f.name for f in dataclasses.fields(self.job) if f.name in SECTIONS]
        if sections:
            with formatter.section("Sections (defaults; some differ by model family, see `plan`)"):
                formatter.write_dl([(name, _fields_of(SECTIONS[name])) for name in sections])
                if "architecture" in {f.name for f in dataclasses.fields(self.job)}:
                    formatter.write_dl(
                        [("architecture", "module names, for a family that memedit does not know")]
                    )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, one a line, never wrapped."""
        heading = "Example" if len(self.examples) == 1 else "Examples"
        with formatter.section(heading):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def _fields_of(kind: type) -> str:
    hints = typing.get_type_hints(kind)
    shown = []
    for field in dataclasses.fields(kind):
        default = field.default
        choices = _literals(hints[field.name])
        if choices:
            default = "|".join([str(default), *(c for c in choices if c != default)])
        if isinstance(default, tuple):
            default = f"[{', '.join(map(str, default))}]"
        shown.append(f"{field.name}={'auto' if default is None else default}")
    return ", ".join(shown)
