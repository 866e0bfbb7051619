"""Z vectors and second moments that are only numbers, to solve the layers of a tiny model with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from memedit.moments import SecondMoment, Spread
from memedit.prompts import EncodedRequest
from memedit.targets import Target
from tests.tiny import HIDDEN, INNER


def made_targets(requests: Sequence[EncodedRequest]) -> list[Target]:
    """A z vector for each fact."""
    generator = torch.Generator().manual_seed(3)
    return [
        Target(
            case_id=request.request.case_id,
            z_O=torch.randn(HIDDEN, generator=generator),
            h_norm=1.0,
            delta_norm=1.0,
            losses=(1.0,),
            converged=True,
        )
        for request in requests
    ]


def made_moments(layers: Iterable[int], *, scale: float = 1.0) -> dict[int, SecondMoment]:
    """The second moment of keys of this standard deviation, for each layer."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for layer in layers:
        keys_TI = scale * torch.randn(4 * INNER, INNER, generator=generator).double()
        spread = Spread(batches=1, mean_SS=torch.eye(2), squares_SS=torch.eye(2))
        found[layer] = SecondMoment(
            layer=layer, sum_II=keys_TI.T @ keys_TI, tokens=4 * INNER, trace_0=0.0, spread=spread
        )
    return found
