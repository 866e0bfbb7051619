"""How a run of `benchmarks.speed` is shown: on the terminal, and as a row of its table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from benchmarks.material import shown

STAGES = ("statistics", "targets", "solve")


def show(result: Mapping[str, Any]) -> None:
    """Print a run for a person."""
    estimated = " (plain: estimated from a part)" if result["estimated"] else ""
    print(f"\n{result['facts']} facts, {result['threads']} threads{estimated}")
    sides, ratios = result["sides"], result["ratios"]
    print(f"{'seconds':<12}" + "".join(f"{name:>18}" for name in sides))
    for stage in (*STAGES, "whole"):
        line = f"{stage:<12}"
        for name, side in sides.items():
            times = f"{ratios[name][stage]:.1f}x" if name in ratios else ""
            line += f"{side['seconds'][stage]:>10.1f}{times:>8}"
        print(line)
    for name in itertools.islice(sides, 1, None):
        side = sides[name]
        for stage, share in side["share_of_matrix_rate"].items():
            print(f"{name}, {stage}: {side['gflops'][stage]:.0f} GFLOP/s, {share:.0%} of the rate")
        print(f"{name}: {side['facts_per_s_per_core']:.3f} facts/s/core")
    print("matrix rate, GFLOP/s: " + ", ".join(f"{r:.0f}" for r in result["matrix_rate_gflops"]))
    for stage, values in result["agreement"].items():
        told = {k: v for k, v in values.items() if k != "forward_passes"}
        print(f"agreement, {stage}: {told}")
    scored = [("base", result["base_scores"])] + [(n, s["scores"]) for n, s in sides.items()]
    for name, values in scored:
        if values:
            print(f"{name:<9}" + "  ".join(f"{k} {v}" for k, v in shown(values).items()))
    if job := result["job"]:
        share = job["peak_bytes"] / job["model_float32_bytes"]
        print(
            f"job: {job['wall_s']:.0f} s, peak {job['peak_bytes'] / 1e6:.0f} MB,"
            f" {share:.2f} times the model's float32 size"
        )


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of a run in the table of all runs."""
    ratios, targets = result["ratios"], result["agreement"]["targets"]
    job, solve = result["job"], result["agreement"]["solve"]
    row = {"facts": str(result["facts"]), "plain facts": str(targets["plain_facts"])}
    for name in ratios:
        row |= {f"{name}: {stage}": f"{ratios[name][stage]:.1f}x" for stage in (*STAGES, "whole")}
    row |= {
        "z cosine, least": f"{targets['cosine']['least']:.6f}",
        "Δ error, largest": f"{max(solve['delta_relative_error'].values()):.1e}",
        "facts/s/core": f"{result['sides']['memedit']['facts_per_s_per_core']:.3f}",
        "peak / model": f"{job['peak_bytes'] / job['model_float32_bytes']:.2f}" if job else "-",
    }
    for name, side in result["sides"].items():
        score = side["scores"].get("score")
        row[f"score, {name}"] = "-" if score is None else f"{score:.1f}"
    return row
