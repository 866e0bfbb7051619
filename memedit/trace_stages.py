"""The stages of causal tracing: what the model says, the noise's unit, the traces.

As in `memedit.stages`, units depend on the input only, so one process and a cluster agree. Knows
executors; does not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memedit.config import TraceSettings
from memedit.executor import Executor
from memedit.progress import Progress
from memedit.scoring import Ids
from memedit.stages import once
from memedit.tracing import FactTrace, TraceRequest

FACTS_PER_TRACE_UNIT = 8
"""Enough to fill a batch with rows of about the same length; their runs are in memory together."""
PROMPTS_PER_UNIT = 64


def say_next(executor: Executor, contexts: Sequence[Ids]) -> list[int]:
    """The most probable next token after each context."""
    starts = range(0, len(contexts), PROMPTS_PER_UNIT)
    units = [(contexts[start : start + PROMPTS_PER_UNIT],) for start in starts]
    parts = dict(executor.map("next_tokens", units, copies=True))
    return [token for index in range(len(units)) for token in parts[index]]


def find_spread(executor: Executor, requests: Sequence[TraceRequest]) -> float:
    """The standard deviation of the embeddings of all subjects' tokens."""
    ids = [token for r in requests for token in r.ids[r.subject_first : r.subject_last + 1]]
    spread: float = once(executor, "spread", ids)
    return spread


def trace_all(
    executor: Executor,
    requests: Sequence[TraceRequest],
    *,
    settings: TraceSettings,
    spread: float,
    progress: Progress,
) -> list[FactTrace]:
    """Trace some facts, in their order; arguments are those of `memedit.tracing.trace_facts`."""
    progress.start("trace", total=len(requests), unit="facts")
    # Facts of about the same length together: their passes are, too.
    order = sorted(requests, key=lambda request: (len(request.ids), request.case_id))
    size = FACTS_PER_TRACE_UNIT
    units = [(order[i : i + size], settings, spread) for i in range(0, len(order), size)]
    found: dict[str, FactTrace] = {}

    def rest(unit: int) -> Any:
        missing = [request for request in units[unit][0] if request.case_id not in found]
        return (missing, settings, spread) if missing else None

    for _, trace in executor.map("trace", units, copies=True, rest=rest):
        if trace.case_id not in found:
            progress.advance("trace", 1)
        found[trace.case_id] = trace
    progress.finish("trace")
    return [found[request.case_id] for request in requests]
