"""`memedit generate`: greedy continuations, to try a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memedit.generate import greedy_continuations
from memedit.model import load_model
from memedit.progress import Progress
from workflows.evaluate import spec_of
from workflows.settings import GenerateJob


def run_generate(job: GenerateJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit generate`."""
    loaded = load_model(spec_of(job, job.model, progress))
    texts = greedy_continuations(loaded.model, loaded.tokenizer, job.prompts, job.tokens)
    continuations = [
        {"prompt": prompt, "continuation": text}
        for prompt, text in zip(job.prompts, texts, strict=True)
    ]
    return {"model": job.model, "continuations": continuations}
