"""The jobs of studies, as data: methods side by side, and traces; see `workflows.settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from memedit.config import MethodName, TraceSettings
from memedit.errors import InputError
from workflows.fields import option, section
from workflows.settings import FactsJob, SpreadJob, StoringJob, TableJob
from workflows.wording import did_you_mean


@dataclass(frozen=True, kw_only=True)
class CompareJob(FactsJob, StoringJob):
    """`memedit compare`: methods side by side."""

    method: MethodName = option("memit", "Not used; see `methods`.", flag=False)
    methods: str = option(
        "memit,memedit",
        "The methods to compare, with commas: memit, memedit, emmet, alphaedit, rome, ft. The"
        " unedited base is always among them.",
        group="Method",
        metavar="NAMES",
    )
    edits: str = option(
        "1,10,100",
        "Numbers of facts, with commas; a smaller one is part of each larger one.",
        group="Method",
        metavar="COUNTS",
    )
    pairs: int = option(
        0,
        "Also edit so many pairs of relations together and apart: those with the most facts whose "
        "objects differ.",
        group="Method",
        metavar="N",
        at_least=0,
    )
    out: str = option(
        None,
        "Folder or s3:// prefix for the table, the judgements and the report; new or empty.",
        group="Output",
        metavar="PLACE",
        required=True,
        location="path",
    )

    @property
    def method_names(self) -> tuple[MethodName, ...]:
        """The methods, each once.

        Raises:
            InputError: There is no such method.
        """
        known = get_args(MethodName)
        names = dict.fromkeys(name.strip() for name in self.methods.split(","))
        names.pop("base", None)
        for name in names:
            if name not in known:
                raise InputError(f"no method {name!r}{did_you_mean(name, known)}", field="methods")
        return cast(tuple[MethodName, ...], tuple(names))

    @property
    def edit_counts(self) -> tuple[int, ...]:
        """The numbers of facts, ascending.

        Raises:
            InputError: One is no number above zero.
        """
        try:
            counts = {int(text) for text in self.edits.split(",")}
        except ValueError:
            counts = {0}
        if min(counts) < 1:
            raise InputError(f"not numbers of facts: {self.edits!r}; write 1,10,100", field="edits")
        return tuple(sorted(counts))

    def check(self) -> None:
        """See `Job`."""
        _ = self.method_names, self.edit_counts


@dataclass(frozen=True, kw_only=True)
class TraceJob(TableJob, SpreadJob, StoringJob):
    """`memedit trace`: which states of the model bring back its facts."""

    limit: int = option(
        100,
        "Trace so many facts at most, the first in canonical order that the model knows.",
        group="Method",
        metavar="N",
        at_least=1,
    )
    out: str = option(
        None,
        "Folder or s3:// prefix for the effects, their means and the page; new or empty.",
        group="Output",
        metavar="PLACE",
        required=True,
        location="path",
    )
    trace: Mapping[str, Any] = section("trace")

    @property
    def trace_settings(self) -> TraceSettings:
        """How facts are traced."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return TraceSettings(**{**seed, **self.trace})
