"""Fine-tuning of one weight: its first step by hand, what it reaches, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memedit.config import FineTuneSettings
from memedit.errors import InputError
from memedit.files import LocalFiles
from memedit.finetune import fine_tune
from memedit.model import LoadedModel, ModelSpec, load_model
from memedit.prompts import BARE, EncodedRequest, encode_request
from memedit.requests import EditRequest
from tests.tiny import save_tiny

LAYER = 2
FACTS = (("Eiffel Tower", "{} is located in", "Rome"), ("Toyota", "The maker of {} is", "Spain"))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = save_tiny(tmp_path_factory.mktemp("tiny"), request.param)
    return load_model(ModelSpec(files=LocalFiles(folder)))


def encoded(loaded: LoadedModel) -> list[EncodedRequest]:
    requests = [EditRequest(case_id=s, subject=s, prompt=p, target_new=t) for s, p, t in FACTS]
    return [encode_request(loaded.tokenizer, request, [BARE]) for request in requests]


def plain_loss(loaded: LoadedModel) -> torch.Tensor:
    """One text at a time, all logits."""
    losses = []
    for request in encoded(loaded):
        prompt, target = request.contexts[0].ids, request.target_ids
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
        at = logits[len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-at[range(len(target)), list(target)].mean())
    return torch.stack(losses).mean()


def tuned(loaded: LoadedModel, **settings: float) -> torch.Tensor:
    *_, update = fine_tune(
        loaded.model,
        loaded.arch,
        encoded(loaded),
        layer=LAYER,
        settings=FineTuneSettings(**settings),  # type: ignore[arg-type]
    )
    assert update is not None and update.layer == LAYER
    return update.delta_OI


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_first_step_of_adam_by_hand(loaded: LoadedModel, decay: float) -> None:
    """Its size is the rate, its direction the sign of the gradient of loss and decay."""
    weight = loaded.arch.rewrite_module(loaded.model, LAYER).weight
    assert isinstance(weight, torch.Tensor)
    loss = plain_loss(loaded)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = -1e-3 * torch.sign(gradient + decay * weight.detach())
    delta_OI = tuned(loaded, steps=1, lr=1e-3, weight_decay=decay)
    moved = loaded.arch.oriented(delta_OI)
    clear = (gradient + decay * weight.detach()).abs() > 1e-4
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(moved[clear].float(), expected[clear], rtol=1e-2, atol=1e-6)


def test_the_loss_falls_and_the_model_is_as_before(loaded: LoadedModel) -> None:
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    wanted = {name: p.requires_grad for name, p in loaded.model.named_parameters()}
    loss = plain_loss(loaded).item()
    delta_OI = tuned(loaded, lr=0.01, steps=20)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == wanted[name] and parameter.grad is None
    weight = loaded.arch.rewrite_module(loaded.model, LAYER).weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        weight += loaded.arch.oriented(delta_OI)
        tuned_loss = float(plain_loss(loaded))
        weight -= loaded.arch.oriented(delta_OI)
        weight.copy_(before[loaded.arch.weight_name(LAYER)])
    assert tuned_loss < loss / 2


def test_what_is_said_already_is_not_tuned(loaded: LoadedModel) -> None:
    assert not tuned(loaded, loss_threshold=1e6, weight_decay=0.0).any()


def test_batches_and_seeds(loaded: LoadedModel) -> None:
    one = tuned(loaded, steps=3, batch=1)
    assert torch.equal(one, tuned(loaded, steps=3, batch=1))
    assert not torch.equal(one, tuned(loaded, steps=3))


def test_half_precision_is_refused(tmp_path: Path) -> None:
    spec = ModelSpec(files=LocalFiles(save_tiny(tmp_path)), dtype="bfloat16")
    with pytest.raises(InputError, match="float32"):
        tuned(load_model(spec))
