"""The method on every dense family: z, keys and the solved update, held against the plain oracle.

What breaks here and not on Llama: positions that are learned or come from a slope (ALiBi), blocks
that return tuples, a weight that is stored transposed, a scaled residual stream, flattened batches.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import Architecture, architecture_of
from memedit.config import TargetSettings
from memedit.keys import KeyPass
from memedit.prompts import EncodedRequest, Located, encode_request
from memedit.requests import EditRequest
from memedit.solve import LayerProblem, MomentFactor, solve_from_factors
from memedit.targets import optimise_targets
from tests.plain import ModuleNames, plain_current, plain_target
from tests.tiny import DENSE, HIDDEN, tiny_model, tiny_tokenizer

FIRST, LAST = 1, 2
CONTEXTS = ("{}", "Therefore I think. {}", "Because the tower stands in Germany, it is. {}")
REQUESTS = [
    EditRequest(case_id=str(i), subject=subject, prompt=prompt, target_new=target)
    for i, (subject, prompt, target) in enumerate(
        [
            ("Eiffel Tower", "The {} is located in the city of", "Rome"),
            ("Danielle Darrieux", "{}'s mother tongue is", "English words"),
            ("Steve", "I know that {} founded", "Microsoft"),
        ]
    )
]


@pytest.fixture(params=DENSE)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Architecture]:
    model = tiny_model(request.param)
    return model, architecture_of(model.config)


@pytest.fixture(scope="module")
def encoded() -> list[EncodedRequest]:
    tokenizer = tiny_tokenizer(bos=True)
    return [encode_request(tokenizer, request, CONTEXTS) for request in REQUESTS]


def _names(arch: Architecture) -> ModuleNames:
    block = arch.family.blocks + ".{}"
    return ModuleNames(
        block=block, rewrite=f"{block}.{arch.family.rewrite}", transposed=arch.family.conv1d
    )


def _current(model: PreTrainedModel, arch: Architecture) -> Tensor:
    tokenizer = tiny_tokenizer(bos=True)
    return plain_current(model, tokenizer, REQUESTS, LAST, names=_names(arch))


def test_facts_that_converge_leave_and_others_join(encoded: list[EncodedRequest]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    arch = architecture_of(model.config)
    slow: dict[str, list[float]] = {r.case_id: [] for r in REQUESTS}
    settings = TargetSettings(steps=12, lr=0.2, loss_threshold=0.0)
    for request in REQUESTS:
        one = slow[request.case_id]
        plain_target(model, tokenizer, request, CONTEXTS, settings, LAST, losses=one)
    # A loss that one fact passes half way, and the others sooner, later or never.
    threshold = sorted(slow.values(), key=lambda losses: losses[5])[1][5]
    settings = TargetSettings(steps=12, lr=0.2, loss_threshold=threshold, tokens_per_batch=60)
    targets = optimise_targets(model, arch, encoded, layer=LAST, settings=settings)
    found = {target.case_id: target for target in targets}
    assert len({len(target.losses) for target in found.values()}) > 1
    assert {target.converged for target in found.values()} == {True, False}
    for request in REQUESTS:
        z_O = plain_target(model, tokenizer, request, CONTEXTS, settings, LAST)
        torch.testing.assert_close(found[request.case_id].z_O, z_O, atol=2e-4, rtol=1e-3)


def test_targets_equal_the_plain_ones(
    family: tuple[PreTrainedModel, Architecture], encoded: list[EncodedRequest]
) -> None:
    model, arch = family
    # Fewer facts a batch than facts, so that one is refilled.
    settings = TargetSettings(steps=4, lr=0.2, tokens_per_batch=60)
    targets = optimise_targets(model, arch, encoded, layer=LAST, settings=settings)
    found = {target.case_id: target for target in targets}
    tokenizer, names = tiny_tokenizer(bos=True), _names(arch)
    now_NO = _current(model, arch)
    for request, h_O in zip(REQUESTS, now_NO, strict=True):
        target = found[request.case_id]
        losses: list[float] = []
        z_O = plain_target(
            model, tokenizer, request, CONTEXTS, settings, LAST, names=names, losses=losses
        )
        assert (z_O - h_O).norm() > 0.1  # it moved
        assert (target.z_O - z_O).norm() <= 1e-3 * (z_O - h_O).norm()
        assert target.losses == pytest.approx(losses[: len(target.losses)], rel=1e-4)


@torch.no_grad()
def test_keys_and_states_follow_the_updates_below(
    family: tuple[PreTrainedModel, Architecture], encoded: list[EncodedRequest]
) -> None:
    model, arch = family
    walk = KeyPass(model, arch, encoded, last_layer=LAST)
    for layer in (FIRST, LAST):
        keys = walk.at(layer)
        expected_NI = torch.stack([_key(model, arch, request, layer) for request in encoded])
        torch.testing.assert_close(keys.keys_NI, expected_NI, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(keys.current_NO, _current(model, arch), atol=1e-5, rtol=1e-4)
        weight = arch.oriented(arch.rewrite_module(model, layer).weight)
        generator = torch.Generator().manual_seed(layer)
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def _key(model: PreTrainedModel, arch: Architecture, request: EncodedRequest, layer: int) -> Tensor:
    """The mean of the bare prompt's key and of the mean of the others, each text run by itself."""

    def key(text: Located) -> Tensor:
        seen: list[Tensor] = []
        handle = arch.rewrite_module(model, layer).register_forward_pre_hook(
            lambda _module, args: seen.append(args[0])
        )
        model(input_ids=torch.tensor([text.ids]), use_cache=False)
        handle.remove()
        return seen[0].reshape(len(text.ids), -1)[text.subject_last]

    bare, *prefixed = (key(text) for text in request.contexts)
    return (bare + torch.stack(prefixed).mean(0)) / 2


@torch.no_grad()
def test_solved_update_brings_the_states_to_z(
    family: tuple[PreTrainedModel, Architecture],
) -> None:
    """With λ near 0 and one layer, each fact's state becomes its z, whatever the family."""
    model, arch = family
    tokenizer = tiny_tokenizer(bos=True)
    bare = [encode_request(tokenizer, request, ("{}",)) for request in REQUESTS]
    keys = KeyPass(model, arch, bare, last_layer=LAST).at(LAST)
    wanted_NO = torch.randn(len(bare), HIDDEN, generator=torch.Generator().manual_seed(3))
    z_NO = keys.current_NO + wanted_NO
    update = solve_from_factors(
        LayerProblem(
            layer=LAST,
            keys_NI=keys.keys_NI.double(),
            residuals_NO=(z_NO - keys.current_NO).double() / arch.residual_scale,
            moment=MomentFactor(torch.eye(keys.keys_NI.shape[1]), layer=LAST),
            lam=1e-7,
        )
    )
    weight_OI = arch.oriented(arch.rewrite_module(model, LAST).weight)
    weight_OI.add_(update.delta_OI.to(weight_OI.dtype))
    torch.testing.assert_close(_current(model, arch), z_NO, atol=1e-3, rtol=1e-3)
