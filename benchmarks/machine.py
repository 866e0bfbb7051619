"""What this machine can do: its float32 matrix rate, which is the limit that speeds are held to.

    python -m benchmarks.machine

Measures products of the shapes that editing SmolLM2 is made of, and square ones; reports GFLOP/s
(a product of [m, k] and [k, n] counts 2·m·k·n operations) with one thread and with all.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

from benchmarks.record import append_row, save_json

SHAPES: dict[str, tuple[int, int, int]] = {
    "z up (512 tokens)": (512, 576, 1536),
    "z down (512 tokens)": (512, 1536, 576),
    "head (128 positions)": (128, 576, 49152),
    "moment (2,048 tokens)": (1536, 2048, 1536),
    "square 512": (512, 512, 512),
    "square 1024": (1024, 1024, 1024),
    "square 2048": (2048, 2048, 2048),
    "square 4096": (4096, 4096, 4096),
}
"""Name: m, k, n of [m, k] · [k, n]."""


def matrix_rate_gflops(m: int, k: int, n: int, *, at_least_s: float = 0.3) -> float:
    """Best rate of one float32 product over repeats that take `at_least_s` in all."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    out = torch.mm(a, b)
    best_s, spent_s = float("inf"), 0.0
    while spent_s < at_least_s:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        took_s = time.perf_counter() - started
        best_s, spent_s = min(best_s, took_s), spent_s + took_s
    return 2 * m * k * n / best_s / 1e9


def best_rate_gflops(*, at_least_s: float = 0.3) -> float:
    """The best rate over the square products, with the threads that torch uses now."""
    squares = (shape for name, shape in SHAPES.items() if name.startswith("square"))
    return max(matrix_rate_gflops(*shape, at_least_s=at_least_s) for shape in squares)


def measure(threads: int) -> dict[str, float]:
    """GFLOP/s of every shape with so many threads; torch's own number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {name: matrix_rate_gflops(*shape) for name, shape in SHAPES.items()}
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="the larger number")
    args = parser.parse_args()
    rates = {threads: measure(threads) for threads in sorted({1, args.threads})}
    print(f"{'GFLOP/s, float32':<24}" + "".join(f"{t:>6} threads" for t in rates))
    for name in SHAPES:
        print(f"{name:<24}" + "".join(f"{rates[t][name]:>14.0f}" for t in rates))
    save_json("machine", {"gflops": {str(t): values for t, values in rates.items()}})
    squares = [name for name in SHAPES if name.startswith("square")]
    cells = {f"best square, {t} threads": f"{max(rates[t][s] for s in squares):.0f}" for t in rates}
    cells |= {name: f"{rates[args.threads][name]:.0f}" for name in SHAPES if name not in squares}
    append_row("machine", cells)


if __name__ == "__main__":
    main()
