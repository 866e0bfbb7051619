"""memedit against the plain formulation, side by side in one run.

    python -m benchmarks.speed                     # everything on 100 facts: about half an hour
    python -m benchmarks.speed --plain-facts 10 --plain-tokens 4096      # quick: minutes

Three sides do the same job on the same facts and text. `plain` is `tests.plain`: one fact and one
layer at a time. `memedit` has identical settings, so its z and Δ must be equal. `defaults` is
memedit with the settings that it chooses by itself, judged by its score. The sides take turns in
slices, so a machine that becomes slower becomes so for all. With `--plain-facts` and
`--plain-tokens` the plain side does a stated part and its times are scaled up: an estimate.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.job import checkpoint_bytes_float32, run_edit
from benchmarks.machine import best_rate_gflops
from benchmarks.material import (
    OpenExecutor,
    RunSettings,
    add_material_arguments,
    corpus_windows,
    default_settings,
    first_facts,
    first_rows,
    given_targets,
    restored,
    scores,
    solve,
    spec_of,
)
from benchmarks.operations import moment_operations, target_operations
from benchmarks.record import append_row, save_json
from benchmarks.speed_table import STAGES, cells, show
from memedit import collect, stages
from memedit.config import MomentSettings
from memedit.model import LoadedModel, load_model
from memedit.moments import SecondMoment
from memedit.progress import Silent
from memedit.prompts import EncodedRequest, encode_request
from memedit.requests import EditRequest
from memedit.targets import Target, width
from tests.plain import plain_edit, plain_moments, plain_target
from workflows.models import resolve_model

T = TypeVar("T")
# Slices are whole units of memedit's own work, so that taking turns costs it nothing.
TOKENS_PER_UNIT = collect.TOKENS_PER_COUNT


@dataclass(kw_only=True)
class Side:
    """One way of doing the job: its settings, what it has found, and the seconds of each stage."""

    name: str
    settings: RunSettings
    windows: list[list[int]]
    encoded: list[EncodedRequest]
    moments: dict[int, SecondMoment] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    zs: dict[str, Tensor] = field(default_factory=dict)
    """By case id; the plain side may leave facts out."""
    scores: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of all threads, unscaled: how much of the wall time another process took."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall and the processor time of what is inside."""
        started, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[stage] += time.perf_counter() - started
        self.cpu_seconds[stage] += time.process_time() - cpu

    @property
    def total_s(self) -> float:
        """All three stages."""
        return sum(self.seconds[stage] for stage in STAGES)


def in_turns(sides: Sequence[Callable[[int], None]], slices: int) -> None:
    """Call each side for each slice, in rotating order: A B C, B C A, and so on."""
    for turn in range(slices):
        for offset in range(len(sides)):
            sides[(turn + offset) % len(sides)](turn)


def sliced(items: Sequence[T], slices: int, *, unit: int) -> list[Sequence[T]]:
    """Contiguous slices, each of whole units as memedit cuts its work, so cutting costs nothing."""
    units = math.ceil(len(items) / unit)
    edges = [units * i // slices * unit for i in range(slices + 1)]
    return [items[start:end] for start, end in itertools.pairwise(edges)]


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def collect_statistics(
    base: LoadedModel,
    executor: OpenExecutor,
    plain: Side,
    fasts: Sequence[Side],
    *,
    plain_tokens: int | None,
    slices: int,
) -> dict[str, Any]:
    """Second moments of all layers by every side; how far memedit's are from the plain ones."""
    chosen = plain.windows
    if plain_tokens is not None:
        chosen = spread(chosen, max(slices, plain_tokens // plain.settings.moments.window))
    sums: dict[int, Tensor] = {}
    plain_slices = sliced(chosen, slices, unit=1)

    def plain_turn(turn: int) -> None:
        with plain.timed("statistics"):
            for layer in plain.settings.layers:
                mean_II, count = plain_moments(
                    base.model, base.tokenizer, plain_slices[turn], layer
                )
                sums[layer] = mean_II * count + sums.get(layer, torch.zeros(()))

    def fast_turn(side: Side) -> Callable[[int], None]:
        # With an early stop the whole is one job; it is done in the first turn.
        parts = 1 if side.settings.moments.tolerance else slices
        cut = sliced(side.windows, parts, unit=TOKENS_PER_UNIT // side.settings.moments.window)

        def run(turn: int) -> None:
            if turn < len(cut):
                with side.timed("statistics"):
                    _add_moments(executor, side, cut[turn])

        return run

    in_turns([plain_turn, *map(fast_turn, fasts)], slices)
    counted = sum(map(len, chosen))
    share = counted / sum(map(len, plain.windows))
    plain.seconds["statistics"] /= share
    equal = fasts[0]
    if share < 1:  # compare on what the plain side has counted
        equal = replace(equal, moments={})
        _add_moments(executor, equal, chosen)
    errors = {
        layer: relative_error(equal.moments[layer].value_II, sums[layer] / counted)
        for layer in plain.settings.layers
    }
    return {"plain_share": share, "relative_error": errors}


def _add_moments(executor: OpenExecutor, side: Side, windows: Sequence[list[int]]) -> None:
    if not windows:
        return
    found = collect.collect_moments(
        executor,
        windows,
        layers=side.settings.layers,
        settings=side.settings.moments,
        progress=Silent(),
    )
    for moment in found:
        layer, known = moment.layer, side.moments.get(moment.layer)
        side.moments[layer] = moment if known is None else known.merge(moment)


def find_all_targets(
    base: LoadedModel,
    executor: OpenExecutor,
    plain: Side,
    fasts: Sequence[Side],
    *,
    plain_facts: int | None,
    slices: int,
) -> dict[str, Any]:
    """Z of all facts by every side; how far memedit's are from the plain ones."""
    # Widest first, as memedit takes them.
    order = sorted(plain.encoded, key=width, reverse=True)
    chosen = spread(order, plain_facts) if plain_facts else order
    plain_slices = sliced(chosen, slices, unit=1)

    def plain_turn(turn: int) -> None:
        for encoded in plain_slices[turn]:
            request = encoded.request
            with plain.timed("targets"):
                plain.zs[request.case_id] = plain_target(
                    base.model,
                    base.tokenizer,
                    request,
                    plain.settings.contexts,
                    plain.settings.targets,
                    max(plain.settings.layers),
                )

    def fast_turn(side: Side) -> Callable[[int], None]:
        units = stages.target_units(side.encoded, side.settings.targets)
        cut = sliced(units, slices, unit=1)

        def run(turn: int) -> None:
            if not cut[turn]:
                return
            with side.timed("targets"):
                found, _ = stages.find_targets(
                    executor,
                    [encoded for unit in cut[turn] for encoded in unit],
                    layer=max(side.settings.layers),
                    settings=side.settings.targets,
                    known={},
                    keep=lambda target: None,
                    progress=Silent(),
                )
            side.targets |= {target.case_id: target for target in found}

        return run

    in_turns([plain_turn, *map(fast_turn, fasts)], slices)
    for side in fasts:
        side.zs = {case_id: target.z_O for case_id, target in side.targets.items()}
    plain.seconds["targets"] *= len(order) / len(chosen)
    pairs = [(fasts[0].targets[case_id], z_O) for case_id, z_O in plain.zs.items()]
    cosines = [float(torch.cosine_similarity(t.z_O, z_O, dim=0)) for t, z_O in pairs]
    errors = [relative_error(t.z_O, z_O) for t, z_O in pairs]
    of_delta = [float((t.z_O - z_O).norm()) / max(t.delta_norm, 1e-12) for t, z_O in pairs]
    return {
        "plain_facts": len(chosen),
        "cosine": {"least": min(cosines), "median": median(cosines)},
        "relative_error": {"median": median(errors), "largest": max(errors)},
        "relative_error_of_delta": {"median": median(of_delta), "largest": max(of_delta)},
        "forward_passes": {
            side.name: sum(len(t.losses) for t in side.targets.values()) for side in fasts
        },
    }


def solve_all(
    base: LoadedModel, executor: OpenExecutor, plain: Side, fasts: Sequence[Side]
) -> dict[str, Any]:
    """Keys, current states and updates by every side, and the scores of the edited models.

    plain and memedit are given the same C, and the same z where the plain side has them all.
    """
    s = plain.settings
    requests = [encoded.request for encoded in plain.encoded]
    chosen = [place for place, request in enumerate(requests) if request.case_id in plain.zs]
    whole = len(chosen) == len(requests)
    some = [requests[place] for place in chosen]
    zs_NO = torch.stack([plain.zs[request.case_id] for request in some])
    moments = {layer: moment.value_II for layer, moment in fasts[0].moments.items()}

    def fast_turn() -> None:
        for number, side in enumerate(fasts):
            zs = plain.zs if whole and number == 0 else side.zs
            given_NO = torch.stack([zs[request.case_id] for request in requests])
            targets = given_targets(side.encoded, given_NO)
            with side.timed("solve"):
                solve(executor, side.encoded, targets, side.moments, side.settings)
            side.scores = side.scores or scores(executor.loaded, requests)
            executor.reset()

    fast_turn()
    with restored(base, s.layers):
        with plain.timed("solve"):
            deltas = plain_edit(
                base.model, base.tokenizer, some, s.contexts, zs_NO, moments, s.lam, s.layers
            )
        if whole:
            plain.scores = scores(base, requests)
    fast_turn()
    for side in fasts:
        side.seconds["solve"] /= 2
    if not whole:  # all but the solve grows with the facts
        constant_s = _plain_solve_s(moments[s.layers[0]], s.lam, len(chosen)) * len(s.layers)
        per_fact_s = (plain.seconds["solve"] - constant_s) / len(chosen)
        plain.seconds["solve"] = constant_s + per_fact_s * len(requests)

    # For the comparison of Δ: the same facts, z and C.
    encoded = [fasts[0].encoded[place] for place in chosen]
    equal = solve(executor, encoded, given_targets(encoded, zs_NO), fasts[0].moments, s)
    executor.reset()
    return {
        "facts_compared": len(chosen),
        "delta_relative_error": {n: relative_error(equal[n], deltas[n]) for n in s.layers},
    }


def _plain_solve_s(moment_II: Tensor, lam: float, facts: int) -> float:
    right_IN = torch.randn(len(moment_II), facts, dtype=torch.float64)
    started = time.perf_counter()
    torch.linalg.solve(lam * moment_II, right_IN)
    return time.perf_counter() - started


def relative_error(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ / ‖true‖."""
    return float((found.double() - true.double()).norm() / true.double().norm())


def weigh_job(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of `memedit edit` against what it has to hold, with cold caches."""
    folder = resolve_model(args.model).files.here
    with tempfile.TemporaryDirectory() as out, first_rows(args.facts, args.facts_count) as facts:
        done = run_edit(
            model=args.model,
            facts=facts,
            corpus=args.corpus,
            out=Path(out) / "out",
            more=["--on-bad-row", "skip"],
        )
    return {
        "wall_s": done.wall_s,
        "timings_s": done.report["timings_s"],
        "metrics": done.report["metrics"],
        "peak_bytes": done.peak_bytes,
        "model_float32_bytes": checkpoint_bytes_float32(folder),
        "layers": done.report["layers"],
    }


def main() -> None:
    """Run all sides; print, store and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--facts-count", type=int, default=100, metavar="N")
    parser.add_argument("--tokens", type=int, default=60_000, help="of the statistics, at most")
    parser.add_argument("--slices", type=int, default=4, help="turns that each side takes")
    parser.add_argument("--plain-facts", type=int, help="how many facts the plain side does")
    parser.add_argument("--plain-tokens", type=int, help="how many tokens the plain side counts")
    parser.add_argument("--no-defaults", action="store_true", help="leave that side out")
    parser.add_argument("--no-job", action="store_true", help="leave out the job's peak memory")
    args = parser.parse_args()

    # The job first: a process of its own, before this one holds a model.
    job = None if args.no_job else weigh_job(args)
    spec = spec_of(args)
    rate_gflops = [best_rate_gflops()]
    base, executor = load_model(spec), OpenExecutor(spec)
    same = RunSettings(moments=MomentSettings(tokens=args.tokens, tolerance=0.0))
    requests, _ = first_facts(base, args.facts, args.facts_count, same.contexts)
    settings = {"plain": same, "memedit": same}
    if not args.no_defaults:
        own = default_settings(base, len(requests))
        fewer = replace(own.moments, tokens=min(own.moments.tokens, args.tokens))
        settings["defaults"] = replace(own, moments=fewer)
    plain, *fasts = (_side(base, args.corpus, name, s, requests) for name, s in settings.items())

    slices = args.slices
    agreement = {
        "statistics": collect_statistics(
            base, executor, plain, fasts, plain_tokens=args.plain_tokens, slices=slices
        ),
        "targets": find_all_targets(
            base, executor, plain, fasts, plain_facts=args.plain_facts, slices=slices
        ),
        "solve": solve_all(base, executor, plain, fasts),
    }
    rate_gflops.append(best_rate_gflops())
    result = {
        "facts": len(requests),
        "threads": torch.get_num_threads(),
        "matrix_rate_gflops": rate_gflops,
        "estimated": bool(args.plain_facts or args.plain_tokens),
        "agreement": agreement,
        "base_scores": scores(base, requests),
        "sides": {side.name: _summary(base, side, max(rate_gflops)) for side in (plain, *fasts)},
        "ratios": {side.name: _ratios(plain, side) for side in fasts},
        "job": job,
    }
    show(result)
    save_json("speed", result)
    append_row("speed", cells(result))


def _side(
    base: LoadedModel,
    corpus: Path,
    name: str,
    settings: RunSettings,
    requests: Sequence[EditRequest],
) -> Side:
    return Side(
        name=name,
        settings=settings,
        windows=corpus_windows(base, corpus, settings.moments),
        encoded=[encode_request(base.tokenizer, r, settings.contexts) for r in requests],
    )


def _ratios(plain: Side, side: Side) -> dict[str, float]:
    ratios = {stage: plain.seconds[stage] / side.seconds[stage] for stage in STAGES}
    return {**ratios, "whole": plain.total_s / side.total_s}


def _tokens(side: Side) -> int:
    """Tokens in the statistics, position 0 included."""
    moment = side.moments[side.settings.layers[0]]
    skipped = len(side.windows) if side.settings.moments.position_0 == "exclude" else 0
    return moment.tokens + skipped


def _summary(loaded: LoadedModel, side: Side, rate_gflops: float) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "settings": asdict(side.settings),
        "seconds": {stage: side.seconds[stage] for stage in STAGES} | {"whole": side.total_s},
        "cpu_seconds": dict(side.cpu_seconds),
        "scores": side.scores,
    }
    if side.targets:
        facts, cores = len(side.targets), torch.get_num_threads()
        summary["facts_per_s_per_core"] = facts / side.total_s / cores
        counts = {
            "statistics": moment_operations(loaded, side.settings.layers, tokens=_tokens(side)),
            "targets": target_operations(
                loaded,
                max(side.settings.layers),
                [(e, len(side.targets[e.request.case_id].losses)) for e in side.encoded],
            ),
        }
        summary["gflops"] = {n: c / side.seconds[n] / 1e9 for n, c in counts.items()}
        summary["share_of_matrix_rate"] = {
            name: value / rate_gflops for name, value in summary["gflops"].items()
        }
    return summary


if __name__ == "__main__":
    main()
