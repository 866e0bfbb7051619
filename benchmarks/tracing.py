"""Causal tracing by memedit against one restored state per forward pass, on the same facts.

    python -m benchmarks.tracing                              # a sample of 100 facts, both ways
    python -m benchmarks.tracing --sample 100 --states 0      # all of it, both ways: many hours

The facts are the first 100 of the table that the model knows; both ways trace every n-th of them in
order of length. The plain way (`tests.plain_tracing`, as the published code does it: a fact's clean
and corrupted runs are one batch) restores some states of each, evenly drawn, and its time is scaled
to all of them. Effects must agree. Wall time is told, and processor time, which says more on a
machine that does other things as well.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.material import OpenExecutor, add_material_arguments, first_rows, spec_of
from benchmarks.record import append_row, save_json
from memedit.config import TraceSettings
from memedit.model import LoadedModel
from memedit.progress import Silent
from memedit.trace_stages import FACTS_PER_TRACE_UNIT, find_spread
from memedit.tracing import KINDS, TraceRequest, noise_of, trace_facts, window_around
from tests.plain_tracing import plain_probability
from workflows.facts import read_facts
from workflows.session import open_base, sift
from workflows.study_settings import TraceJob
from workflows.trace import choose, encode_question


@dataclass(kw_only=True)
class Clock:
    """Seconds of one way."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter() - self._began[0]
        self.cpu_s += time.process_time() - self._began[1]


def main() -> None:
    """Trace both ways; print and store a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--rows", type=int, default=2000, help="of the table, to look for facts in")
    parser.add_argument("--count", type=int, default=100, help="facts that the model knows")
    parser.add_argument("--sample", type=int, default=8, help="of them, traced both ways")
    parser.add_argument("--states", type=int, default=60, help="of a fact the plain way; 0: all")
    parser.add_argument("--samples", type=int, default=10, help="of noise")
    args = parser.parse_args()
    spec = spec_of(args)
    settings = TraceSettings(samples=args.samples)
    with OpenExecutor(spec) as executor:
        requests = known_facts(args, executor, settings)
        spread = find_spread(executor, requests)
        by_length = sorted(requests, key=lambda request: (len(request.ids), request.case_id))
        sample = [
            by_length[i * len(by_length) // args.sample]
            for i in range(min(args.sample, len(by_length)))
        ]
        result = both_ways(executor.loaded, sample, settings, spread, states=args.states)
    result |= {"facts_known": len(requests), "threads": args.threads}
    save_json("tracing", result)
    cells = {
        "facts": f"{len(sample)} of {len(requests)}",
        "states a fact": f"{result['states_mean']:.0f}",
        "noise": str(args.samples),
        "plain, s a fact": f"{result['plain']['wall_s'] / len(sample):.0f}",
        "memedit, s a fact": f"{result['memedit']['wall_s'] / len(sample):.1f}",
        "ratio": f"{result['ratio_wall']:.2f}",
        "ratio of processor time": f"{result['ratio_cpu']:.2f}",
        "largest difference": f"{result['largest_difference']:.1e}",
    }
    append_row("tracing", cells)
    print("  ".join(f"{name} {value}" for name, value in cells.items()))


def known_facts(
    args: argparse.Namespace, executor: OpenExecutor, settings: TraceSettings
) -> list[TraceRequest]:
    """The first facts of the table that the model knows."""
    job = TraceJob(model=args.model, facts=str(args.facts), out="-", on_bad_row="skip")
    base = open_base(job, Silent())
    with first_rows(args.facts, args.rows) as some:
        table = read_facts(some, on_bad_row="skip")
    _, questions = sift(table, lambda request: encode_question(request, base), on_bad_row="skip")
    chosen, _ = choose(executor, questions, base.tokenizer, settings=settings, limit=args.count)
    return [place for _, place in chosen]


def both_ways(
    loaded: LoadedModel,
    requests: Sequence[TraceRequest],
    settings: TraceSettings,
    spread: float,
    *,
    states: int,
) -> dict[str, Any]:
    """Trace facts by memedit and plainly, unit by unit in turns."""
    fast, worst = Clock(), 0.0
    plain = Clock()
    counts = []
    # What is first in a process is slow, whichever it is.
    trace_facts(
        loaded.model, loaded.arch, requests[:1], settings=TraceSettings(samples=1), spread=1
    )
    for start in range(0, len(requests), FACTS_PER_TRACE_UNIT):
        unit = requests[start : start + FACTS_PER_TRACE_UNIT]
        with fast:
            traces = trace_facts(loaded.model, loaded.arch, unit, settings=settings, spread=spread)
        for request, trace in zip(unit, traces, strict=True):
            places = [
                (kind, layer, position)
                for kind in KINDS
                for layer in range(loaded.arch.n_layers)
                for position in range(len(request.ids))
            ]
            counts.append(len(places))
            drawn = places if not states else random.Random(start).sample(places, states)
            clock = Clock()
            for place in drawn:
                with clock:
                    found = plain_effect(loaded, request, settings, spread, place)
                kind, layer, position = place
                known = float(trace.effects_LT[kind][layer, position])
                worst = max(worst, abs(found - trace.corrupted - known))
            scale = len(places) / len(drawn)
            plain.wall_s += scale * clock.wall_s
            plain.cpu_s += scale * clock.cpu_s
            print(f"{request.case_id}: {len(request.ids)} tokens, {clock.wall_s:.1f} s", flush=True)
    return {
        "plain": {"wall_s": plain.wall_s, "cpu_s": plain.cpu_s},
        "memedit": {"wall_s": fast.wall_s, "cpu_s": fast.cpu_s},
        "ratio_wall": plain.wall_s / fast.wall_s,
        "ratio_cpu": plain.cpu_s / fast.cpu_s,
        "largest_difference": worst,
        "states_mean": sum(counts) / len(counts),
        "states_drawn": states,
        "samples": settings.samples,
        "tokens": [len(request.ids) for request in requests],
    }


def plain_effect(
    loaded: LoadedModel,
    request: TraceRequest,
    settings: TraceSettings,
    spread: float,
    place: tuple[Any, int, int],
) -> float:
    """P(object) with one state restored, by a whole forward pass."""
    kind, layer, position = place
    n_layers = loaded.arch.n_layers
    layers = (
        [layer]
        if kind == "hidden"
        else window_around(layer, settings.window_of(n_layers), n_layers)
    )
    weight = loaded.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    _, found = plain_probability(
        loaded.model,
        lambda kind, at: {
            "hidden": loaded.arch.block,
            "mlp": loaded.arch.rewrite_module,
            "attention": loaded.arch.attention_output,
        }[kind](loaded.model, at),
        request.ids,
        request.target_id,
        noise_SNO=noise_of(request, settings, spread, weight.shape[1]),
        subject=slice(request.subject_first, request.subject_last + 1),
        restored=[(kind, at, position) for at in layers],
    )
    return found


if __name__ == "__main__":
    main()
