"""Which settings suit a model: layers, λ by number of facts, steps, rate, contexts, decay, clamp.

    python -m benchmarks.sweep --layers 5-9 7-9 --lam 100 400 1500 --count 10 100
    python -m benchmarks.sweep --steps 10 15 20 --lr 0.5 1.0

Every combination of the given values is tried. z vectors depend on the last layer, the contexts and
the optimiser's settings only, so they are found once for each of these, kept in `--store`, and
shared by all λ, all numbers of facts and all layer sets with the same last layer. What is shown is
the first facts' scores after an edit with the first N facts, in memory.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.material import (
    OpenExecutor,
    RunSettings,
    add_material_arguments,
    corpus_windows,
    first_facts,
    given_targets,
    scores,
    shown,
    solve,
    spec_of,
)
from benchmarks.record import append_row, save_json
from memedit import stages
from memedit.collect import collect_moments
from memedit.config import MomentSettings, TargetSettings, digest_of
from memedit.progress import Silent
from memedit.prompts import BARE, FIXED_CONTEXTS, EncodedRequest
from workflows.fields import parse_layers


@dataclass(frozen=True, kw_only=True)
class FoundTargets:
    """z of all facts, the mean number of forward passes, and the seconds a fact took."""

    zs_NO: Tensor
    passes: float
    seconds_per_fact: float


def find_targets(
    executor: OpenExecutor,
    encoded: Sequence[EncodedRequest],
    settings: TargetSettings,
    layer: int,
    *,
    model: str,
    store: Path,
) -> FoundTargets:
    """Z of all facts from the store, or found now and stored."""
    ids = [[list(text.ids) for text in e.contexts] + [list(e.target_ids)] for e in encoded]
    path = store / f"{digest_of(model, ids, settings, layer)}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            passes, seconds = file.get_tensor("cost").tolist()
            return FoundTargets(
                zs_NO=file.get_tensor("zs"), passes=passes, seconds_per_fact=seconds
            )
    started = time.perf_counter()
    found, _ = stages.find_targets(
        executor,
        encoded,
        layer=layer,
        settings=settings,
        known={},
        keep=lambda target: None,
        progress=Silent(),
    )
    seconds = (time.perf_counter() - started) / len(encoded)
    passes = sum(len(target.losses) for target in found) / len(found)
    zs_NO = torch.stack([target.z_O for target in found])
    store.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    cost = torch.tensor([passes, seconds], dtype=torch.float64)
    save_file({"zs": zs_NO.contiguous(), "cost": cost}, partial)
    partial.replace(path)
    return FoundTargets(zs_NO=zs_NO, passes=passes, seconds_per_fact=seconds)


def main() -> None:
    """Try all combinations; print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--count", type=int, nargs="+", default=[100], help="facts edited")
    parser.add_argument("--judge", type=int, default=200, help="facts judged, at most")
    parser.add_argument("--layers", nargs="+", default=["5-9"], help="such as 5-9 or 5,7,9")
    parser.add_argument("--lam", type=float, nargs="+", default=[400.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.5])
    parser.add_argument("--contexts", type=int, nargs="+", default=[5], help="beside the bare one")
    parser.add_argument("--weight-decay", type=float, nargs="+", default=[0.5])
    parser.add_argument("--clamp", type=float, nargs="+", default=[0.75])
    parser.add_argument("--tokens", type=int, default=60_000, help="of the statistics")
    parser.add_argument("--store", type=Path, default=Path("runs/sweep"))
    args = parser.parse_args()

    executor = OpenExecutor(spec_of(args))
    loaded = executor.loaded
    counting = MomentSettings(tokens=args.tokens, tolerance=0.0)
    layer_sets = [_layers(text) for text in args.layers]
    counted = collect_moments(
        executor,
        corpus_windows(loaded, args.corpus, counting),
        layers=tuple(sorted({n for layers in layer_sets for n in layers})),
        settings=counting,
        progress=Silent(),
    )
    moments = {moment.layer: moment for moment in counted}
    rows: list[dict[str, object]] = []
    best: tuple[float, dict[str, object]] = (-1.0, {})
    for contexts, steps, lr, decay, clamp in itertools.product(
        args.contexts, args.steps, args.lr, args.weight_decay, args.clamp
    ):
        templates = (BARE, *FIXED_CONTEXTS[:contexts])
        requests, encoded = first_facts(loaded, args.facts, max(args.count), templates)
        settings = TargetSettings(steps=steps, lr=lr, v_weight_decay=decay, clamp_norm_factor=clamp)
        for layers, count, lam in itertools.product(layer_sets, args.count, args.lam):
            found = find_targets(
                executor, encoded, settings, max(layers), model=args.model, store=args.store
            )
            deltas = solve(
                executor,
                encoded[:count],
                given_targets(encoded[:count], found.zs_NO[:count]),
                moments,
                RunSettings(layers=layers, lam=lam),
            )
            metrics = scores(executor.loaded, requests[: min(count, args.judge)])
            executor.reset()
            row: dict[str, object] = {
                "facts": count,
                "layers": _shown_layers(layers),
                "λ": lam,
                "steps": steps,
                "lr": lr,
                "contexts": contexts,
                "decay": decay,
                "clamp": clamp,
                "passes": round(found.passes, 1),
                "z, s a fact": round(found.seconds_per_fact, 2),
                "‖Δ‖ of the last layer": round(float(deltas[max(layers)].norm()), 1),
            }
            rows.append(row | metrics)
            best = max(best, (metrics["score"] or 0.0, row), key=lambda pair: pair[0])
            append_row(
                "sweep",
                {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in row.items()}
                | shown(metrics),
            )
            print("  ".join(f"{k} {v}" for k, v in (row | shown(metrics)).items()), flush=True)
    base = scores(executor.loaded, requests[: args.judge])
    save_json("sweep", {"rows": rows, "base": base})
    print(f"base score {base['score']}; best {best[0]:.1f}: {best[1]}")


def _layers(text: str) -> tuple[int, ...]:
    layers = parse_layers(text)
    assert isinstance(layers, tuple)
    return layers


def _shown_layers(layers: Sequence[int]) -> str:
    whole = list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]}-{layers[-1]}" if whole else ",".join(map(str, layers))


if __name__ == "__main__":
    main()
