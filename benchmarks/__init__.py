"""One script per claim, run from the project's root: `python -m benchmarks.speed`."""
