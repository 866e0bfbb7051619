"""The published settings of each model family, and ours where we measured.

Knows numbers and where they come from; finds the row by the model's type and size, never by its
name. A model without a row gets settings derived from its depth, and is told so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from transformers import PretrainedConfig

from memedit.config import (
    ONE_LAYER,
    ContextSettings,
    EditSettings,
    MethodName,
    MomentSettings,
    SolveSettings,
    TargetSettings,
)
from memedit.prompts import FIXED_CONTEXTS

Origin = Literal["published", "tuned here", "guessed"]
"""Settings are those of a paper or its code, were measured with memedit, or follow a rule."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings to start from, with their source."""

    settings: EditSettings
    source: str
    origin: Origin = "published"

    @property
    def known(self) -> bool:
        """Whether they are more than a guess."""
        return self.origin != "guessed"

    @property
    def told(self) -> str:
        """Where they come from, for reading."""
        return f"{self.origin}: {self.source}"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One model's settings; the model is told by its type, depth and width."""

    name: str
    model_type: str
    blocks: int
    hidden: int
    layers: tuple[int, int]
    lr: float
    steps: int
    clamp: float
    decay: float
    lam: float
    source: str


_REFERENCE = "the reference's hparams (kmeng01/memit)"
_EASYEDIT = "EasyEdit's hparams"
# Columns: method.md of the paper's reference, and of EasyEdit for the families that came later.
_ROWS = (
    _Row(name="GPT-2 XL", model_type="gpt2", blocks=48, hidden=1600, layers=(13, 17), lr=0.5,
         steps=20, clamp=0.75, decay=0.5, lam=20_000, source=_REFERENCE),
    _Row(name="GPT-J 6B", model_type="gptj", blocks=28, hidden=4096, layers=(3, 8), lr=0.5,
         steps=25, clamp=0.75, decay=0.5, lam=15_000, source=_REFERENCE),
    _Row(name="GPT-NeoX 20B", model_type="gpt_neox", blocks=44, hidden=6144, layers=(6, 10),
         lr=0.5, steps=20, clamp=0.3, decay=0.5, lam=20_000, source="the paper's appendix"),
    _Row(name="Llama-2 7B", model_type="llama", blocks=32, hidden=4096, layers=(4, 8), lr=0.5,
         steps=25, clamp=4, decay=0.001, lam=15_000, source=_EASYEDIT),
    _Row(name="Qwen2.5 7B", model_type="qwen2", blocks=28, hidden=3584, layers=(7, 11), lr=0.1,
         steps=25, clamp=0.75, decay=0.5, lam=15_000, source=_EASYEDIT),
    _Row(name="Mistral 7B", model_type="mistral", blocks=32, hidden=4096, layers=(4, 8), lr=0.5,
         steps=25, clamp=4, decay=0.001, lam=15_000, source=_EASYEDIT),
)  # fmt: skip

# Llama-3 8B has Llama-2's depth and width; its vocabulary tells them apart.
_LLAMA_3 = _Row(
    name="Llama-3 8B", model_type="llama", blocks=32, hidden=4096, layers=(4, 8), lr=0.1,
    steps=25, clamp=0.75, decay=0.5, lam=15_000, source=_EASYEDIT,
)  # fmt: skip
_LLAMA_3_VOCABULARY = 128_256

_SMOLLM2 = ("llama", 30, 576)
# λ against the number of facts, a power law in between (benchmarks/results/sweep.md). At 10 facts
# 150 to 800 score the same, at 100 they differ little; at 1,000 the score is flat from 800 to 1,500
# and falls below, and efficacy falls above.
_SMOLLM2_LAM = ((10, 150.0), (100, 400.0), (1000, 800.0))


_SMOLLM2_PROTECTED_LAM = ((10, 340.0), (100, 900.0), (250, 1190.0), (1000, 700.0))
"""λ where keys are protected and repair follows: what a larger λ leaves unsaid is repaired, and
what it spares stays spared, until too much is left to repair. Tried at 250 facts, and at 1,000 with
600 and 1,800, between which 700 lies; at 10 and at 100 it is as many times MEMIT's λ as at 250
(docs/decisions/0007-protect-and-repair.md)."""

ALPHAEDIT_LAM = 10.0
"""The weight of the identity in AlphaEdit's code (its `L2`)."""


_BEYOND_MEMIT: dict[MethodName, str] = {
    "memedit": "protected keys and repair were measured on SmolLM2 only",
    "emmet": "not measured for emmet",
    "alphaedit": f"λ {ALPHAEDIT_LAM:g} of AlphaEdit's code",
    "rome": "not measured for rome, which takes the last of the layers",
    "ft": "ft takes the last of the layers, and the reference's steps and learning rate",
}
"""What to say of another method's settings, which are MEMIT's where it has the same."""


def defaults_for(
    config: PretrainedConfig, n_facts: int, *, method: MethodName = "memit"
) -> Defaults:
    """The settings for a model and a method; λ may depend on the number of facts.

    Methods that edit one layer take the last of MEMIT's.

    Args:
        config: The model's config.
        n_facts: How many facts are written at once.
        method: The editing method.
    """
    found = _memit_defaults(config, n_facts)
    settings = replace(found.settings, method=method)
    if method == "memedit" and _key(config) == _SMOLLM2:
        lam = _interpolated(n_facts, _SMOLLM2_PROTECTED_LAM)
        settings = replace(settings, solve=replace(settings.solve, lam=lam))
    if method in ONE_LAYER:
        settings = replace(settings, layers=settings.layers[-1:])
    if method == "alphaedit":
        settings = replace(settings, solve=replace(settings.solve, lam=ALPHAEDIT_LAM))
    source = found.source
    if method == "memedit" and _key(config) == _SMOLLM2:
        where = "docs/decisions/0007-protect-and-repair.md"
        source = f"SmolLM2 135M, tried at 250 facts, and at 1,000 with other λ ({where})"
    elif method != "memit":
        source = f"{source}, for memit; {_BEYOND_MEMIT[method]}"
    return replace(found, settings=settings, source=source)


def _key(config: PretrainedConfig) -> tuple[str, int, int]:
    text = config.get_text_config(decoder=True)
    return (text.model_type, text.num_hidden_layers, text.hidden_size)


def _memit_defaults(config: PretrainedConfig, n_facts: int) -> Defaults:
    text = config.get_text_config(decoder=True)
    key = _key(config)
    if key == _SMOLLM2:
        settings = EditSettings(
            # Against 7-9, 4-6 and 2-6: 85.3, 84.5, 84.4 and 82.7 at 100 facts.
            layers=(5, 6, 7, 8, 9),
            contexts=ContextSettings(templates=tuple(FIXED_CONTEXTS[i] for i in (0, 1, 3))),
            # 20 steps of 0.5 score the same within a point and take twice as long.
            targets=TargetSettings(steps=10, lr=2.0, clamp_norm_factor=0.75, v_weight_decay=0.5),
            moments=MomentSettings(tokens=10_000, window=64),
            solve=SolveSettings(lam=_interpolated(n_facts, _SMOLLM2_LAM)),
        )
        return Defaults(
            settings=settings,
            source="SmolLM2 135M, at 10, 100 and 1,000 facts (benchmarks/results/)",
            origin="tuned here",
        )
    # Some 20 tokens for each input of the rewrite module, which is about four times as wide as the
    # residual stream: enough for C to be regular and for the score to stay where it is.
    moments = MomentSettings(tokens=max(MomentSettings().tokens, 80 * text.hidden_size))
    row = next((r for r in _ROWS if (r.model_type, r.blocks, r.hidden) == key), None)
    if row is not None and row.model_type == "llama" and text.vocab_size == _LLAMA_3_VOCABULARY:
        row = _LLAMA_3
    if row is not None:
        first, last = row.layers
        settings = EditSettings(
            layers=tuple(range(first, last + 1)),
            targets=TargetSettings(
                steps=row.steps,
                lr=row.lr,
                clamp_norm_factor=row.clamp,
                v_weight_decay=row.decay,
            ),
            moments=moments,
            solve=SolveSettings(lam=row.lam),
        )
        return Defaults(settings=settings, source=f"{row.name}: {row.source}")
    return Defaults(
        settings=EditSettings(
            layers=_band(text.num_hidden_layers),
            moments=moments,
            solve=SolveSettings(lam=15_000),
        ),
        source=f"no published settings for {' '.join(map(str, key))}; layers by depth, λ 15,000",
        origin="guessed",
    )


def _band(blocks: int) -> tuple[int, ...]:
    """Up to five layers that end at a third of the depth, where published settings lie."""
    last = max(0, round(blocks / 3) - 1)
    return tuple(range(max(0, last - 4), last + 1))


def _interpolated(n_facts: int, points: Sequence[tuple[int, float]]) -> float:
    """λ on the power law between the points; constant outside of them."""
    if n_facts <= points[0][0]:
        return points[0][1]
    for (n_0, lam_0), (n_1, lam_1) in pairwise(points):
        if n_facts <= n_1:
            share = math.log(n_facts / n_0) / math.log(n_1 / n_0)
            return float(round(lam_0 * (lam_1 / lam_0) ** share, 1))
    return points[-1][1]
