"""What a second worker gains, and what Ray costs: the stages on two workers, on one, and inline.

    python -m benchmarks.scaling                              # about 12 minutes
    python -m benchmarks.scaling --facts-count 40 --tokens 4096 --keys-facts 128    # smaller

Three sides, each with one thread a worker, take turns in one run: `inline` (no Ray), `one` and
`two` Ray workers. z is done in slices that give both workers the same number of whole units, as
memedit cuts them; statistics, and the keys of all layers, are one slice each. A ratio is the
seconds of `one` over those of `two`. The overhead is that of `one` over `inline` on the whole job:
statistics, z, keys and solve, without start-up (Ray, processes, loading), which is in the JSON. The
executors stay open side by side, in one local Ray that was told of more CPUs than there are; who
has no turn does nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median, stdev
from typing import Any

import torch

from benchmarks.machine import best_rate_gflops
from benchmarks.material import (
    OpenExecutor,
    RunSettings,
    add_material_arguments,
    corpus_windows,
    default_settings,
    first_facts,
    solve_on,
    spec_of,
)
from benchmarks.record import append_row, save_json
from benchmarks.speed import in_turns, sliced
from cluster.executors import open_executor, prepare_ray
from memedit import stages
from memedit.collect import collect_moments
from memedit.executor import Executor
from memedit.model import ModelSpec
from memedit.moments import SecondMoment
from memedit.progress import Silent
from memedit.prompts import EncodedRequest
from memedit.targets import Target
from workflows.progress import PlainProgress

STAGES = ("statistics", "z", "keys")
JOB = ("statistics", "z", "keys and solve")
ASKED_RATIO, ASKED_OVERHEAD = 1.8, 0.10
_CPUS = 3
"""Of the local Ray: one worker of `one`, two of `two`."""


@dataclass(kw_only=True)
class Side:
    """An executor, what it has found, and the seconds of each stage."""

    name: str
    executor: Executor
    start_s: float
    moments: dict[int, SecondMoment] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By stage: those of each round."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what is inside to the stage's last round."""
        started = time.perf_counter()
        yield
        self.seconds[stage][-1] += time.perf_counter() - started

    def median_s(self, *stages: str) -> float:
        """The stages together; each by the median of its rounds."""
        return sum(median(self.seconds[stage]) for stage in stages)


class Bench:
    """The work of one run, and the sides that take turns with it."""

    def __init__(self, sides: Sequence[Side], settings: RunSettings, *, slices: int) -> None:
        self.sides, self.settings, self.slices = sides, settings, slices

    def _turns(self, stage: str, slices: int, work: Any, sides: Sequence[Side]) -> None:
        for side in sides:
            side.seconds[stage].append(0.0)

        def turn_of(side: Side) -> Any:
            def turn(number: int) -> None:
                work(side, number)

            return turn

        in_turns([turn_of(side) for side in sides], slices)

    def statistics(self, windows: Sequence[list[int]]) -> None:
        """Second moments of all layers."""

        def work(side: Side, number: int) -> None:
            with side.timed("statistics"):
                collected = collect_moments(
                    side.executor,
                    windows,
                    layers=self.settings.layers,
                    settings=self.settings.moments,
                    progress=Silent(),
                )
                side.moments = {moment.layer: moment for moment in collected}

        # One slice: putting the workers' sums together takes as long for a few tokens as for many.
        self._turns("statistics", 1, work, self.sides)

    def targets(self, encoded: Sequence[EncodedRequest]) -> None:
        """The z vector of every fact."""
        units = stages.target_units(encoded, self.settings.targets)
        cut = sliced(units, self.slices, unit=2)

        def work(side: Side, number: int) -> None:
            if not cut[number]:
                return
            with side.timed("z"):
                found, _ = stages.find_targets(
                    side.executor,
                    [request for unit in cut[number] for request in unit],
                    layer=max(self.settings.layers),
                    settings=self.settings.targets,
                    known={},
                    keep=lambda target: None,
                    progress=Silent(),
                )
            side.targets |= {target.case_id: target for target in found}

        self._turns("z", self.slices, work, self.sides)

    def keys(self, encoded: Sequence[EncodedRequest]) -> None:
        """Keys and current values of all layers, no update between them; only for workers."""
        size = stages.FACTS_PER_KEY_UNIT
        layers = self.settings.layers
        starts = range(0, len(encoded), size)

        def work(side: Side, number: int) -> None:
            with side.timed("keys"):
                for layer in layers:
                    given = [(s, encoded[s : s + size], layer, layers[-1]) for s in starts]
                    for _ in side.executor.map("keys", given, sticky=True):
                        pass

        self._turns("keys", 1, work, [side for side in self.sides if side.name != "inline"])

    def solve(
        self, encoded: Sequence[EncodedRequest], spec: ModelSpec, *, residual_scale: float
    ) -> None:
        """Keys and solve of the job, with each side's own z and moments; the base afterwards."""

        def work(side: Side, number: int) -> None:
            targets = [side.targets[request.request.case_id] for request in encoded]
            with side.timed("keys and solve"):
                solve_on(
                    side.executor,
                    encoded,
                    targets,
                    side.moments,
                    self.settings,
                    residual_scale=residual_scale,
                )
            side.executor.broadcast("load", spec)

        self._turns("keys and solve", 1, work, [s for s in self.sides if s.name != "two"])


def unit_seconds(
    executor: Executor, encoded: Sequence[EncodedRequest], settings: RunSettings, *, units: int
) -> list[float]:
    """Seconds a fact of some units of z vectors, evenly spaced: what a simulation draws from."""
    cut = stages.target_units(encoded, settings.targets)
    taken = []
    for number in range(min(units, len(cut))):
        unit = cut[number * len(cut) // min(units, len(cut))]
        started = time.perf_counter()
        for _ in executor.map("targets", [(unit, max(settings.layers), settings.targets)]):
            pass
        taken.append((time.perf_counter() - started) / len(unit))
    return taken


@contextmanager
def opened(spec: ModelSpec) -> Iterator[list[Side]]:
    """The three sides, each with a model loaded; one local Ray holds both executors."""
    torch.set_num_threads(1)
    with ExitStack() as undo:
        started = time.perf_counter()
        inline = undo.enter_context(OpenExecutor(spec))
        sides = [Side(name="inline", executor=inline, start_s=time.perf_counter() - started)]
        prepare_ray(local=True)
        import ray  # reads what was prepared

        started = time.perf_counter()
        ray.init(
            address="local",
            num_cpus=_CPUS,
            include_dashboard=False,
            object_store_memory=1 << 30,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
        undo.callback(ray.shutdown)
        ray_s = time.perf_counter() - started
        for name, workers in (("one", 1), ("two", 2)):
            started = time.perf_counter()
            executor = open_executor(
                "ray", spec, workers=workers, threads=1, progress=PlainProgress(sys.stdout)
            )
            undo.enter_context(executor)
            took_s = time.perf_counter() - started + ray_s
            sides.append(Side(name=name, executor=executor, start_s=took_s))
        yield sides


def main() -> None:
    """Run all stages on all sides in turns; print, store and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.set_defaults(threads=1)
    add = parser.add_argument
    add("--facts-count", type=int, default=200, metavar="N", help="of the job: z, keys and solve")
    add("--tokens", type=int, default=16_384, help="of the statistics")
    add("--keys-facts", type=int, default=256, help="for the keys' ratio; units are of 64")
    add("--rounds", type=int, default=1, help="of statistics, z and solve")
    add("--keys-rounds", type=int, default=2, help="of the keys' ratio")
    add("--slices", type=int, default=2, help="turns of z that each side takes in a round")
    add("--unit-times", type=int, default=0, metavar="N", help="also time so many units of z")
    args = parser.parse_args()
    if args.threads != 1:
        parser.error("--threads: workers of one thread are what is compared")
    spec = spec_of(args)
    started = time.perf_counter()
    rate_gflops = [best_rate_gflops()]
    with opened(spec) as sides:
        inline = sides[0].executor
        assert isinstance(inline, OpenExecutor)
        loaded = inline.loaded
        own = default_settings(loaded, args.facts_count)
        settings = replace(own, moments=replace(own.moments, tokens=args.tokens, tolerance=0.0))
        windows = corpus_windows(loaded, args.corpus, settings.moments)
        most = max(args.facts_count, args.keys_facts)
        _, all_encoded = first_facts(loaded, args.facts, most, settings.contexts)
        encoded, for_keys = all_encoded[: args.facts_count], all_encoded[: args.keys_facts]
        bench = Bench(sides, settings, slices=args.slices)
        bench.keys(for_keys[:128])  # pages and pools are warm then
        for side in sides:
            side.seconds.clear()
        for number in range(args.rounds):
            print(f"round {number + 1}: statistics, z, keys and solve")
            bench.statistics(windows)
            bench.targets(encoded)
            bench.solve(encoded, spec, residual_scale=loaded.arch.residual_scale)
        for _ in range(args.keys_rounds):
            bench.keys(for_keys)
        times = unit_seconds(sides[1].executor, encoded, settings, units=args.unit_times)
    rate_gflops.append(best_rate_gflops())
    result = {
        "facts": len(encoded),
        "tokens": sum(map(len, windows)),
        "keys_facts": len(for_keys),
        "units": len(stages.target_units(encoded, settings.targets)),
        "cores": os.cpu_count(),
        "matrix_rate_gflops": rate_gflops,
        "start_s": {side.name: side.start_s for side in sides},
        "seconds": {side.name: dict(side.seconds) for side in sides},
        "unit_s_per_fact": times,
        **compared(sides),
        "wall_s": time.perf_counter() - started,
    }
    show(result)
    save_json("scaling", result)
    append_row("scaling", cells(result))


def compared(sides: Sequence[Side]) -> dict[str, Any]:
    """Ratios, overheads, and whether they are what is asked for."""
    inline, one, two = sides
    ratios = {stage: one.median_s(stage) / two.median_s(stage) for stage in STAGES}
    overheads = {stage: one.median_s(stage) / inline.median_s(stage) - 1 for stage in JOB}
    overheads["whole"] = one.median_s(*JOB) / inline.median_s(*JOB) - 1
    return {
        "ratios": ratios,
        "overheads": overheads,
        "met": {
            **{f"{stage}, two workers": ratio >= ASKED_RATIO for stage, ratio in ratios.items()},
            "overhead of Ray": overheads["whole"] <= ASKED_OVERHEAD,
        },
    }


def show(result: Mapping[str, Any]) -> None:
    """Print a run for a person."""
    print(f"\n{result['facts']} facts, {result['tokens']:,} tokens, one thread a worker")
    for name, seconds in result["seconds"].items():
        told = ", ".join(f"{stage} {median(each):.1f} s" for stage, each in seconds.items())
        print(f"{name:<7}{told}; start-up {result['start_s'][name]:.1f} s")
    for stage, ratio in result["ratios"].items():
        print(f"two workers, {stage}: {ratio:.2f}x (asked: {ASKED_RATIO})")
    told = ", ".join(f"{stage} {share:+.1%}" for stage, share in result["overheads"].items())
    print(f"overhead of Ray: {told} (asked of the whole: at most {ASKED_OVERHEAD:.0%})")
    if len(times := result["unit_s_per_fact"]) > 1:
        mean = sum(times) / len(times)
        print(f"units of z: {mean:.2f} s a fact, spread {stdev(times) / mean:.2f}")
    print("matrix rate, GFLOP/s: " + ", ".join(f"{r:.0f}" for r in result["matrix_rate_gflops"]))
    missed = [what for what, met in result["met"].items() if not met]
    print("all met" if not missed else "NOT met: " + "; ".join(missed))


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of a run in the table of all runs."""
    row = {"facts": str(result["facts"]), "tokens": str(result["tokens"])}
    row["keys' facts"] = str(result["keys_facts"])
    row |= {f"two workers: {stage}": f"{ratio:.2f}x" for stage, ratio in result["ratios"].items()}
    row["one on Ray, s"] = f"{sum(median(result['seconds']['one'][s]) for s in JOB):.0f}"
    row["inline, s"] = f"{sum(median(result['seconds']['inline'][s]) for s in JOB):.0f}"
    row["overhead of Ray"] = f"{result['overheads']['whole']:+.1%}"
    row["asked"] = "met" if all(result["met"].values()) else "not met"
    return row


if __name__ == "__main__":
    main()
