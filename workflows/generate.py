"""`memedit generate`: greedy continuations, to try a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memedit.checkpoint import Checkpoint
from memedit.errors import InputError, NumericalError
from memedit.generate import greedy_continuations
from memedit.model import load_model, positions_of
from memedit.progress import Progress
from memedit.prompts import encode
from workflows.evaluate import spec_of
from workflows.settings import GenerateJob


def run_generate(job: GenerateJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit generate`.

    Raises:
        InputError: A prompt leaves no position to continue it, or the weights hold NaN.
    """
    spec = spec_of(job, job.model, progress)
    loaded = load_model(spec)
    positions = positions_of(loaded.model.config)
    for prompt in job.prompts:
        length = len(encode(loaded.tokenizer, prompt))
        if length >= positions:
            raise InputError(
                f"{prompt[:40]!r}… has {length} tokens; the model reads {positions}, and one is"
                " needed to continue",
                field="prompts",
            )
    try:
        texts = greedy_continuations(loaded.model, loaded.tokenizer, job.prompts, job.tokens)
    except NumericalError:
        # Reading every weight takes longer than a continuation: only now is it worth it.
        Checkpoint.open(spec.files).check_finite()
        raise
    continuations = [
        {"prompt": prompt, "continuation": text}
        for prompt, text in zip(job.prompts, texts, strict=True)
    ]
    return {"model": job.model, "continuations": continuations}
