"""The keys that an edit must leave as they are, counted on prompts made for a batch of facts.

What prompts these are is in `memedit.protection`; they are counted as a corpus is, by the same
workers, and kept like it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from cluster.artifacts import Artifacts
from memedit.config import EditSettings, EvaluationSettings, MomentSettings, digest_of
from memedit.executor import Executor
from memedit.model import positions_of
from memedit.progress import Progress
from memedit.prompts import encode
from memedit.protection import prompts_elsewhere, protecting_prompts
from memedit.requests import EditRequest
from memedit.scoring import Ids
from workflows.moments import Counted, StoredMoments, TokenSource, moments_for
from workflows.session import Base

_LEAST_TOKENS = 2
"""Position 0 is not protected: all texts share it."""


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What an edit leaves as it is, and how that is looked at."""

    moments: StoredMoments | None
    """Second moments C_p of the keys, by layer; None where nothing is protected."""
    prompts: int
    """How many are protected."""
    heldout: tuple[Ids, ...]
    """Prompts of the same kind that are not protected; their drift is measured."""


@dataclass(frozen=True, kw_only=True)
class _Prompts(Counted):
    """Prompts as windows of tokens, one each."""

    ids: tuple[Ids, ...]
    name: str = "protected prompts"

    @property
    def digest(self) -> str:
        """See `Counted`."""
        return digest_of(self.name, self.ids)

    def windows(self, executor: Executor, progress: Progress) -> list[list[int]]:
        """See `Counted`."""
        return [list(ids) for ids in self.ids]


def prompts_for_drift(
    requests: Sequence[EditRequest],
    heldout: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    positions: float,
    settings: EvaluationSettings,
) -> list[str]:
    """Prompts for drift, with names of held-out text, for facts that bring none to measure it on.

    Those that are no longer than `positions`, as far as the model reads.
    """
    texts = [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in heldout]
    made = prompts_elsewhere(requests, texts, count=settings.drift_prompts)
    return [prompt for prompt in made if len(encode(tokenizer, prompt)) <= positions]


def protection_for(
    requests: Sequence[EditRequest],
    source: TokenSource,
    *,
    base: Base,
    settings: EditSettings,
    executor: Executor,
    artifacts: Artifacts,
    progress: Progress,
) -> Protection | None:
    """Count the protected keys of a batch of facts on the model as it is, the base.

    None for methods that protect nothing.
    """
    if settings.method != "memedit":
        return None
    chosen = protecting_prompts(
        requests,
        source.texts(executor, progress),
        settings=settings.protect,
        heldout=settings.repair.prompts,
    )
    protected, heldout = (
        tuple(
            dict.fromkeys(
                ids
                for prompt in prompts
                if _LEAST_TOKENS
                <= len(ids := tuple(encode(base.tokenizer, prompt)))
                <= positions_of(base.config)
            )
        )
        for prompts in (chosen.protected, chosen.heldout)
    )
    if settings.repair.rounds and settings.repair.prompts and not heldout:
        progress.message("too few prompts were found to measure drift on: it does not limit repair")
    if not protected:
        if settings.protect.prompts:
            progress.message(
                f"no names were found in {source.name} to protect other subjects with; the edit is "
                "made without protected keys"
            )
        return Protection(moments=None, prompts=0, heldout=heldout)
    tokens = sum(map(len, protected))
    counted = MomentSettings(
        tokens=tokens,
        window=max(map(len, protected)),
        position_0="exclude",
        seed=settings.protect.seed,
    )
    moments = moments_for(
        _Prompts(ids=protected),
        base=base,
        settings=replace(settings, moments=counted),
        executor=executor,
        artifacts=artifacts,
        progress=progress,
    )
    return Protection(moments=moments, prompts=len(protected), heldout=heldout)
