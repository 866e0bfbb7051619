"""How the scheduler scales: a simulation of up to 1,024 workers that drives the real `Dispatch`.

    python -m benchmarks.simulate                           # the whole grid: two minutes
    python -m benchmarks.simulate --workers 256 --facts-counts 100000 --lives-h 1

Work is z vectors, in units as `memedit.stages.target_units` makes them of the real facts; units of
a larger job are those of all these facts, repeated. The time of a unit goes with its positions, and
with a lognormal spread; the mean is what the newest `results/speed-*.json` measured on this model
(processor seconds of a fact, so a worker of one thread), or a GPU's, which is ASSUMED.

calm: nothing goes wrong. trouble: workers die and come back, some attempts take 10 times as long.
lean: the same trouble, and a driver whose loop costs nothing for each worker and each call that is
waited for; what is left is Ray's share for each event and storing. No trouble is part of useful
work, so stragglers alone cost share · (slowness - 1) of the efficiency.

Costs of the driver: `Dispatch` and storing a z vector (an fsync) are measured in this run. Given
are Ray's: for each event 0.3 ms (measured once on two cores: 0.1 ms to wait, 0.02 to get, 0.1 to
submit), and for each call that is waited for 1.7 µs (3.5 ms with 2,048 of them); and for each
worker, at each event, 0.4 µs in the executor's own loops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.driver_costs import driver_costs, measured_keep_s
from benchmarks.material import add_material_arguments, default_settings, first_facts, spec_of
from benchmarks.record import RESULTS, append_row, save_json
from benchmarks.simulation import DriverCosts, Simulation, Trouble, Unit
from memedit.model import load_model
from memedit.prompts import EncodedRequest
from memedit.stages import target_units
from memedit.targets import rows_of, width

ASKED = 0.9
ASKED_AT = (256, 100_000)
SCENARIOS = ("calm", "trouble", "lean")


def measured_fact_s(results: Path = RESULTS) -> tuple[float, str]:
    """Processor seconds of one fact's z vector with memedit's own settings, and where it says so.

    Raises:
        FileNotFoundError: No run of `benchmarks.speed` had that side.
    """
    for path in sorted(results.glob("speed-*.json"), reverse=True):
        run = json.loads(path.read_text(encoding="utf-8"))
        side = run["sides"].get("defaults", {})
        if "targets" in side.get("cpu_seconds", {}):
            return side["cpu_seconds"]["targets"] / run["facts"], path.name
    raise FileNotFoundError(f"{results}: no speed-*.json with the side `defaults`")


def positions(request: EncodedRequest) -> int:
    """Positions that each pass over a fact computes."""
    return rows_of(request) * width(request)


def repeated(units: Sequence[Sequence[EncodedRequest]], facts: int, fact_s: float) -> list[Unit]:
    """Units for so many facts: each of the given ones as often as the others, in their order."""
    whole = [(len(unit), sum(map(positions, unit))) for unit in units]
    known = sum(count for count, _ in whole)
    position_s = fact_s * known / sum(weight for _, weight in whole)
    made, owed = [], 0
    for count, weight in whole:
        owed += facts * count  # times `known`, so that it stays whole
        times = owed // (known * count)
        owed -= times * known * count
        made += [Unit(facts=count, mean_s=weight * position_s)] * times
    if rest := owed // known:
        made.append(Unit(facts=rest, mean_s=whole[-1][1] / whole[-1][0] * rest * position_s))
    return made


def simulate(
    units: Sequence[Unit], costs: DriverCosts, args: argparse.Namespace, *, workers: int
) -> dict[str, dict[str, Any]]:
    """Each scenario with so many workers."""
    trouble = Trouble(
        lives_s=3600 * args.lives_h,
        restart_s=args.restart_s,
        stragglers=args.stragglers,
        slowness=args.slowness,
    )
    lean = replace(costs, reference_s=0.0, worker_s=0.0, idle_s=0.0)
    cases = {"calm": (Trouble(), costs), "trouble": (trouble, costs), "lean": (trouble, lean)}
    found = {}
    for name in SCENARIOS:
        wrong, driver = cases[name]
        run = Simulation(
            units,
            workers=workers,
            spread=args.spread,
            trouble=wrong,
            costs=driver,
            seed=args.seed,
        )
        found[name] = asdict(run.run())
    return found


def main() -> None:
    """Simulate the grid; print, store and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    add = parser.add_argument
    counts = [1_000, 10_000, 100_000, 1_000_000]
    add("--workers", type=int, nargs="+", default=[1, 4, 16, 64, 256, 512, 1024])
    add("--facts-counts", type=int, nargs="+", default=counts, metavar="N")
    add("--unit-facts", type=int, default=2000, help="real facts that units are made of")
    add("--fact-s", type=float, help="of a worker; by default what benchmarks.speed measured")
    add("--gpu-fact-s", type=float, default=0.25, help="of a GPU: an assumption")
    add("--spread", type=float, default=0.2, help="standard deviation of a unit's time / its mean")
    add("--lives-h", type=float, default=4.0, help="mean hours until a worker dies")
    add("--restart-s", type=float, default=60.0, help="from a death until the next is ready")
    add("--stragglers", type=float, default=0.002, help="share of attempts that take long")
    add("--slowness", type=float, default=10.0, help="how many times as long those take")
    add("--event-ms", type=float, default=0.3, help="of the driver in Ray, each event")
    add("--reference-us", type=float, default=1.7, help="in Ray, each call that is waited for")
    add("--slot-us", type=float, default=0.4, help="of the executor, each worker at each event")
    add("--keep-ms", type=float, help="storing a z vector; by default measured here")
    add("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.perf_counter()
    loaded = load_model(spec_of(args))
    settings = default_settings(loaded, args.unit_facts)
    _, encoded = first_facts(loaded, args.facts, args.unit_facts, settings.contexts)
    units = target_units(encoded, settings.targets)
    fact_s, source = (args.fact_s, "given") if args.fact_s else measured_fact_s()
    if args.keep_ms is None:
        keep_s = measured_keep_s(loaded.model.config.get_text_config().hidden_size)
    else:
        keep_s = args.keep_ms / 1000
    del loaded
    costs = {
        workers: driver_costs(
            workers,
            event_s=args.event_ms / 1e3,
            reference_s=args.reference_us / 1e6,
            slot_s=args.slot_us / 1e6,
            keep_s=keep_s,
        )
        for workers in args.workers
    }
    profiles = {"CPU, measured": fact_s, "GPU, assumed": args.gpu_fact_s}
    print(f"storing a z vector: {1e3 * keep_s:.2f} ms")
    runs: list[dict[str, Any]] = []
    for profile, seconds in profiles.items():
        print(f"\n{profile}: {seconds:.2f} s a fact and worker")
        for facts, workers in itertools.product(args.facts_counts, args.workers):
            made = repeated(units, facts, seconds)
            found = simulate(made, costs[workers], args, workers=workers)
            runs.append({"profile": profile, "workers": workers, "facts": facts, **found})
            _show(runs[-1])
    verdicts = met(runs)
    result = {
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "fact_s": profiles,
        "fact_s_source": {"CPU, measured": source, "GPU, assumed": "assumed"},
        "keep_s": keep_s,
        "units": {
            "of_facts": len(encoded),
            "count": len(units),
            "facts_least": min(map(len, units)),
            "facts_most": max(map(len, units)),
        },
        "driver_costs": {str(workers): asdict(cost) for workers, cost in costs.items()},
        "runs": runs,
        "asked": {"efficiency": ASKED, "at": ASKED_AT, "met": verdicts},
        "wall_s": time.perf_counter() - started,
    }
    print(f"\nasked: efficiency {ASKED} with {ASKED_AT[0]} workers and {ASKED_AT[1]:,} facts")
    for profile, cases in verdicts.items():
        told = ", ".join(f"{name} {'met' if yes else 'NOT met'}" for name, yes in cases.items())
        print(f"  {profile}: {told or 'not simulated'}")
    save_json("simulate", result)
    append_row("simulate", cells(result))


def met(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, bool]]:
    """Whether each profile has the efficiency that is asked for, by scenario."""
    return {
        run["profile"]: {name: run[name]["efficiency"] >= ASKED for name in SCENARIOS}
        for run in runs
        if (run["workers"], run["facts"]) == ASKED_AT
    }


def _show(run: Mapping[str, Any]) -> None:
    for name in SCENARIOS:
        one = run[name]
        print(
            f"{run['facts']:>9,} facts {run['workers']:>5} workers {name:<8}"
            f"{one['makespan_s']:>10.0f} s  efficiency {one['efficiency']:.3f}"
            f"  driver {one['driver_share']:>4.0%}  deaths {one['deaths']:>4}"
            f"  retried {one['retried']:>4}  copied {one['copied']:>4}  twice {one['twice']:>3}"
            f"  z again {one['again']:>4}" + ("  GIVEN UP" if one["given_up"] else "")
        )


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of a run: at the asked number of facts, efficiency and the driver's share."""
    row = {"s a fact": ", ".join(f"{k}: {v:.2f}" for k, v in result["fact_s"].items())}
    row["storing, ms"] = f"{1e3 * result['keep_s']:.2f}"
    found = {(r["profile"], r["workers"]): r for r in result["runs"] if r["facts"] == ASKED_AT[1]}
    for profile, workers in itertools.product(result["fact_s"], (64, 256, 1024)):
        run = found.get((profile, workers))
        row[f"{profile}, {workers}: calm / trouble / lean"] = (
            " / ".join(f"{run[name]['efficiency']:.3f}" for name in SCENARIOS) if run else "-"
        )
        row[f"{profile}, {workers}: driver"] = (
            f"{run['trouble']['driver_share']:.0%}" if run else "-"
        )
    for profile in result["fact_s"]:
        cases = result["asked"]["met"].get(profile)
        row[f"{profile}: asked"] = (
            "-" if cases is None else "met" if cases["trouble"] else "not met"
        )
    return row


if __name__ == "__main__":
    main()
