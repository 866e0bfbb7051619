"""What a GPU makes of GPT-NeoX-20B's shape, and whether SmolLM2 is edited right on it.

    python -m benchmarks.gpu_20b --record                       # one GPU of 80 GB
    python -m benchmarks.gpu_20b --device cpu --blocks 4 --hidden 64      # a try: nothing is stored

The weights are random, in bfloat16, made on the device, of the real config's sizes. Measured
with the product's own functions: tokens a second of the statistics, z vectors a second one at a
time and in the best batch, both also as a share of the device's measured matrix rate, and the
seconds of the solve in float64. Random weights cost what real ones do, but no fact stops early.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from benchmarks.material import (
    OpenExecutor,
    add_material_arguments,
    corpus_windows,
    default_settings,
    first_facts,
    scores,
    solve,
)
from benchmarks.operations import moment_operations, target_operations
from benchmarks.record import append_row, save_json
from benchmarks.shapes import neox_20b
from memedit import collect, stages
from memedit.architecture import architecture_of
from memedit.config import MomentSettings, TargetSettings
from memedit.memory import release_memory
from memedit.model import LoadedModel, ModelSpec, load_tokenizer
from memedit.moments import MomentAccumulator
from memedit.progress import Silent
from memedit.prompts import BARE, FIXED_CONTEXTS, EncodedRequest
from memedit.solve import (
    LayerProblem,
    MomentFactor,
    SummedProblem,
    Update,
    solve_from_factors,
    solve_from_sums,
)
from memedit.targets import optimise_targets
from workflows.models import resolve_model
from workflows.rate import measured_rate

BLOCKS, HIDDEN = 44, 6144
LAYERS = (6, 7, 8, 9, 10)
WINDOW = 512
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
"""Positions in a batch of z vectors that are tried."""


def random_model(model: str, *, blocks: int, hidden: int, device: str) -> LoadedModel:
    """GPT-NeoX-20B, or a smaller one like it, with random bfloat16 weights on a device.

    Its token ids are those of the tokenizer of `model`, whose vocabulary is smaller.
    """
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    heads = {"num_attention_heads": max(1, hidden // 96)}
    config = GPTNeoXConfig(**{**neox_20b(blocks).config, **sizes, **heads})
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return LoadedModel(
        model=made.eval().requires_grad_(False),
        tokenizer=load_tokenizer(resolve_model(model).files),
        known_arch=architecture_of(config),
    )


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Wall time of some work, until the device has done it."""
    started = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def statistics(
    loaded: LoadedModel, layers: Sequence[int], *, tokens: int, device: str, rate: float
) -> dict[str, float]:
    """Tokens a second of the second moments, in batches as workers count them."""
    random = torch.Generator().manual_seed(0)
    rows = max(1, collect.TOKENS_PER_COUNT // WINDOW)
    vocabulary = len(loaded.tokenizer)
    batches = [
        torch.randint(vocabulary, (rows, WINDOW), generator=random).tolist()
        for _ in range(max(1, tokens // (rows * WINDOW)))
    ]
    counting = MomentAccumulator(loaded.model, loaded.arch, layers=layers, count_0=True)
    counting.add(batches[0])  # warms up, and makes room for the sums

    def count() -> None:
        for batch in batches:
            counting.add(batch)

    seconds = seconds_of(count, device)
    counted = len(batches) * rows * WINDOW
    work = moment_operations(loaded, layers, tokens=counted)
    return {
        "tokens": counted,
        "tokens_per_s": counted / seconds,
        "share_of_matrix_rate": work / seconds / rate,
    }


def targets(
    loaded: LoadedModel,
    layer: int,
    facts: Sequence[EncodedRequest],
    *,
    budget: int,
    steps: int,
    device: str,
    rate: float,
) -> dict[str, float] | None:
    """Facts a second of the z vectors in batches of `budget` positions; None without the memory."""
    settings = TargetSettings(steps=steps, tokens_per_batch=budget, loss_threshold=0.0)

    def optimise(some: Sequence[EncodedRequest]) -> list[int]:
        found = optimise_targets(loaded.model, loaded.arch, some, layer=layer, settings=settings)
        passes = {target.case_id: len(target.losses) for target in found}
        return [passes[fact.request.case_id] for fact in some]

    try:
        optimise(facts[:1])
        passes: list[int] = []
        seconds = seconds_of(lambda: passes.extend(optimise(facts)), device)
    except torch.OutOfMemoryError:
        return None
    finally:
        release_memory()
    work = target_operations(loaded, layer, zip(facts, passes, strict=True))
    return {
        "budget": budget,
        "facts": len(facts),
        "facts_per_s": len(facts) / seconds,
        "share_of_matrix_rate": work / seconds / rate,
    }


def solve_seconds(inputs: int, outputs: int, *, edits: int, device: str) -> dict[str, Any]:
    """Seconds of both forms of the closed form for one layer, float64, their factor included.

    Raises:
        RuntimeError: They do not give the same update.
    """
    random = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random, dtype=torch.float64, device=device)

    keys_NI, residuals_NO = normal(edits, inputs), normal(edits, outputs)
    low_KI = normal(min(256, inputs), inputs)
    moment_II = low_KI.T @ low_KI / len(low_KI)
    moment_II.diagonal().add_(1)

    def factors() -> Update:
        moment = MomentFactor(moment_II, layer=0)
        problem = LayerProblem(
            layer=0, keys_NI=keys_NI, residuals_NO=residuals_NO, moment=moment, lam=15_000.0
        )
        return solve_from_factors(problem)

    def sums() -> Update:
        problem = SummedProblem(
            layer=0,
            keys_II=keys_NI.T @ keys_NI,
            residual_keys_OI=residuals_NO.T @ keys_NI,
            moment_II=moment_II,
            lam=15_000.0,
        )
        return solve_from_sums(problem)

    found: dict[str, Any] = {"inputs": inputs, "edits": edits}
    for name, work in (("factors_s", factors), ("sums_s", sums)):
        found[name] = min(seconds_of(work, device) for _ in range(2))
        release_memory()
    one_OI, other_OI = factors().delta_OI, sums().delta_OI
    found["forms_differ_by"] = float((one_OI - other_OI).norm() / other_OI.norm())
    if not found["forms_differ_by"] < 1e-8:
        raise RuntimeError(f"the two forms of the solve differ by {found['forms_differ_by']:.1e}")
    return found


def smollm2_scores(args: argparse.Namespace) -> dict[str, Any]:
    """The scores of a real model before and after an edit on the same device."""
    executor = OpenExecutor(ModelSpec(files=resolve_model(args.model).files, device=args.device))
    loaded = executor.loaded
    chosen = default_settings(loaded, args.facts_count)
    tokens = MomentSettings(tokens=args.smollm2_tokens, window=chosen.moments.window)
    settings = replace(chosen, moments=tokens)
    requests, encoded = first_facts(loaded, args.facts, args.facts_count, settings.contexts)
    before = scores(loaded, requests)
    moments = collect.collect_moments(
        executor,
        corpus_windows(loaded, args.corpus, settings.moments),
        layers=settings.layers,
        settings=settings.moments,
        progress=Silent(),
    )
    found, _ = stages.find_targets(
        executor,
        encoded,
        layer=max(settings.layers),
        settings=settings.targets,
        known={},
        keep=lambda target: None,
        progress=Silent(),
    )
    solve(executor, encoded, found, {m.layer: m for m in moments}, settings, device=args.device)
    return {"facts": len(requests), "before": before, "after": scores(loaded, requests)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run; the models come one after the other."""
    device = args.device
    result: dict[str, Any] = {"device": device, "blocks": args.blocks, "hidden": args.hidden}
    result["real_shape"] = (args.blocks, args.hidden) == (BLOCKS, HIDDEN)
    result["smollm2"] = smollm2_scores(args)
    release_memory()
    rate = measured_rate(device, torch.bfloat16, seconds=1.0)
    result["matrix_tflops_bfloat16"] = rate / 1e12
    loaded = random_model(args.model, blocks=args.blocks, hidden=args.hidden, device=device)
    layers = tuple(layer for layer in LAYERS if layer < args.blocks - 1) or (0,)
    same: dict[str, Any] = {"device": device, "rate": rate}
    result["statistics"] = statistics(loaded, layers, tokens=args.tokens, **same)
    release_memory()
    _, facts = first_facts(loaded, args.facts, args.z_facts, (BARE, *FIXED_CONTEXTS))
    same |= {"steps": args.steps}
    single = targets(loaded, layers[-1], facts[:2], budget=1, **same)
    tried = [targets(loaded, layers[-1], facts, budget=budget, **same) for budget in args.budgets]
    done = [run for run in tried if run is not None]
    result["z"] = {
        "single": single,
        "batches": done,
        "best": max(done, key=lambda run: run["facts_per_s"], default=None),
    }
    del loaded
    release_memory()
    edits = min(args.edits, 2 * args.hidden)
    result["solve"] = solve_seconds(4 * args.hidden, args.hidden, edits=edits, device=device)
    return result


def cells(result: dict[str, Any]) -> dict[str, str]:
    """The row of a run in the table of all runs."""
    counted, z, solved = result["statistics"], result["z"], result["solve"]
    row = {
        "blocks × hidden": f"{result['blocks']} × {result['hidden']}",
        "bf16 rate": f"{result['matrix_tflops_bfloat16']:.3g} TFLOP/s",
        "statistics": f"{counted['tokens_per_s']:,.0f} tokens/s"
        f" ({counted['share_of_matrix_rate']:.0%} of the rate)",
    }
    for name, run in (("z, one at a time", z["single"]), ("z, best batch", z["best"])):
        row[name] = "no memory" if run is None else f"{run['facts_per_s']:.3g} facts/s"
    if z["best"] is not None:
        row["z, best batch"] += (
            f" ({z['best']['share_of_matrix_rate']:.0%}; {z['best']['budget']} positions)"
        )
    efficacy = result["smollm2"]["after"]
    return row | {
        "solve": f"I = {solved['inputs']:,}, {solved['edits']:,} edits:"
        f" {solved['factors_s']:.3g} s (factors), {solved['sums_s']:.3g} s (sums)",
        "SmolLM2, after": ", ".join(
            f"{name} {value:.1f}" for name, value in efficacy.items() if value is not None
        ),
    }


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_material_arguments(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="a multiple of 32")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument("--z-facts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of each z")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="POSITIONS")
    parser.add_argument("--edits", type=int, default=10_000, help="facts of the solve")
    parser.add_argument("--facts-count", type=int, default=20, help="that SmolLM2 is given")
    parser.add_argument("--smollm2-tokens", type=int, default=10_000, help="of its statistics")
    parser.add_argument("--record", action="store_true", help="store the result in results/")
    return parser.parse_args(given)


def main() -> None:
    """Measure and print; store only what was asked to be."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args)
    for name, value in cells(result).items():
        print(f"{name:<18}{value}")
    if args.record:
        save_json("gpu-20b", result)
        append_row("gpu-20b", cells(result))


if __name__ == "__main__":
    main()
