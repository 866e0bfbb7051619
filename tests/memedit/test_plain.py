"""The oracle is checked against what transformers, torch and linear algebra say by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memedit.config import TargetSettings
from memedit.prompts import FIXED_CONTEXTS, encode_request
from memedit.requests import EditRequest
from tests.plain import (
    ModuleNames,
    forward_logits,
    hooked,
    pad_right,
    plain_current,
    plain_edit,
    plain_keys,
    plain_moments,
    plain_target,
    plain_target_ids,
    plain_tokens,
)
from tests.tiny import tiny_model, tiny_tokenizer
from workflows.models import cache_folder

CONTEXTS = ("{}", "It rained. {}", "As the newspaper said, and many believed it. {}")
LAYER = 2
NO_STOP = TargetSettings(loss_threshold=-1.0, clamp_norm_factor=4.0)
FACTS = Path(__file__).parents[3] / "shared" / "data" / "counterfact-2000.jsonl"


def request(subject: str = "Eiffel Tower", target: str = "Rome") -> EditRequest:
    return EditRequest(
        case_id=subject, subject=subject, prompt="The {} is in the city of", target_new=target
    )


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def smollm2() -> tuple[Any, Any]:
    found = sorted((cache_folder() / "models").glob("*smollm2*/config.json"))
    if not found:
        pytest.skip("SmolLM2 has not been converted yet")
    folder = found[-1].parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def state_at_subject(model: Any, tokenizer: Any, r: EditRequest) -> Tensor:
    return plain_current(model, tokenizer, [r], LAYER)[0]


# ------------------------------------------------------------------------------------ tokens


def test_the_last_subject_token_is_the_last_one_that_shows_a_letter_of_it(tokenizer: Any) -> None:
    for subject in ("Eiffel Tower", "Zoë Kravitz", "東京", "X"):
        for context in CONTEXTS:
            ids, last = plain_tokens(tokenizer, context, "The {} is in", subject)
            assert tokenizer.decode(ids[: last + 1]).rstrip().endswith(subject)
            assert not tokenizer.decode(ids[:last]).endswith(subject)


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_equal_those_of_memedit(bos: bool) -> None:
    tokenizer = tiny_tokenizer("bytelevel", bos)
    for r in (request(), request("Zoë Kravitz", "New York City"), request("東京", "é")):
        assert_same_encoding(tokenizer, r, CONTEXTS)


def assert_same_encoding(tokenizer: Any, r: EditRequest, contexts: tuple[str, ...]) -> None:
    encoded = encode_request(tokenizer, r, contexts)
    for context, located in zip(contexts, encoded.contexts, strict=True):
        ids, last = plain_tokens(tokenizer, context, r.prompt, r.subject)
        assert (tuple(ids), last) == (located.ids, located.subject_last)
    assert tuple(plain_target_ids(tokenizer, r.target_new)) == encoded.target_ids


# ----------------------------------------------------------------------------------- moments


def test_moments_are_the_mean_outer_product_of_what_the_module_reads(
    model: Any, tokenizer: Any
) -> None:
    texts = ["The quick brown fox.", "Ein anderer Satz, etwas länger als der erste."]
    keys = []
    module = model.model.layers[LAYER].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _, args: keys.append(args[0][0]))
    for text in texts:
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    rows = torch.cat(keys).double()
    moment, tokens = plain_moments(model, tokenizer, texts, LAYER)
    assert tokens == len(rows) and moment.dtype == torch.float64
    torch.testing.assert_close(moment, torch.einsum("ti,tj->ij", rows, rows) / len(rows))

    rows = torch.cat([k[1:] for k in keys]).double()
    moment, tokens = plain_moments(model, tokenizer, texts, LAYER, position_0=False)
    assert tokens == len(rows)
    torch.testing.assert_close(moment, rows.T @ rows / len(rows))


def test_windows_of_ids_are_taken_as_they_are(model: Any, tokenizer: Any) -> None:
    text = "The quick brown fox."
    moment, _ = plain_moments(model, tokenizer, [text], LAYER)
    window, _ = plain_moments(model, tokenizer, [tokenizer(text)["input_ids"]], LAYER)
    assert torch.equal(moment, window)


# ----------------------------------------------------------------------------------- targets


def test_the_first_loss_is_the_mean_of_the_losses_that_transformers_computes(
    model: Any, tokenizer: Any
) -> None:
    r = request(target="Rome, Italy")
    target = plain_target_ids(tokenizer, r.target_new)
    expected = []
    for context in CONTEXTS:  # one row at a time: the oracle's padding must not matter
        ids, _ = plain_tokens(tokenizer, context, r.prompt, r.subject)
        labels = [-100] * len(ids) + target
        expected.append(model(torch.tensor([ids + target]), labels=torch.tensor([labels])).loss)
    losses: list[float] = []
    plain_target(
        model, tokenizer, r, CONTEXTS, TargetSettings(steps=1), LAYER, losses=losses
    )  # at δ = 0 there is neither KL nor weight decay
    assert losses == pytest.approx([torch.stack(expected).mean().item()], rel=1e-5)


def test_the_last_forward_pass_makes_no_update(model: Any, tokenizer: Any) -> None:
    r = request()
    losses: list[float] = []
    z_O = plain_target(model, tokenizer, r, CONTEXTS, TargetSettings(steps=1), LAYER, losses=losses)
    torch.testing.assert_close(z_O, state_at_subject(model, tokenizer, r))
    assert len(losses) == 1


def test_the_first_update_is_adams(model: Any, tokenizer: Any) -> None:
    """Adam's first step is lr · g / (|g| + ε): lr in every coordinate where g is not tiny."""
    r = request()
    settings = TargetSettings(steps=2, lr=0.01, clamp_norm_factor=100)
    delta_O = plain_target(model, tokenizer, r, CONTEXTS, settings, LAYER) - state_at_subject(
        model, tokenizer, r
    )
    assert delta_O.abs().median().item() == pytest.approx(0.01, rel=1e-2)


def test_the_second_loss_has_kl_and_weight_decay_as_the_reference_computes_them(
    model: Any, tokenizer: Any
) -> None:
    r = request()
    settings = TargetSettings(steps=2, clamp_norm_factor=100, kl_factor=3.0, v_weight_decay=7.0)
    losses: list[float] = []
    z_O = plain_target(model, tokenizer, r, CONTEXTS, settings, LAYER, losses=losses)
    h_O = state_at_subject(model, tokenizer, r)
    delta_O = z_O - h_O
    target = plain_target_ids(tokenizer, r.target_new)

    def logits(ids: list[int], position: int) -> Tensor:
        def add(_: Tensor, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, position] += delta_O
            return output

        with torch.no_grad(), hooked(model.model.layers[LAYER], add):
            return forward_logits(model, {"input_ids": torch.tensor([ids])})[0]

    nll = []
    for context in CONTEXTS:
        ids, position = plain_tokens(tokenizer, context, r.prompt, r.subject)
        read = logits(ids + target, position)[len(ids) - 1 : -1]
        nll.append(torch.nn.functional.cross_entropy(read, torch.tensor(target)))
    ids, position = plain_tokens(tokenizer, "{}", "{} is a", r.subject)
    with torch.no_grad():
        before = forward_logits(model, {"input_ids": torch.tensor([ids])})[:, position]
    kl = torch.nn.functional.kl_div(  # the arguments as the reference passes them
        before.log_softmax(1),
        logits(ids, position)[None, position].log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    decay = delta_O.norm() / h_O.norm() ** 2
    expected = torch.stack(nll).mean() + 3.0 * kl + 7.0 * decay
    assert kl > 1e-3
    assert losses[1] == pytest.approx(expected.item(), rel=1e-5)


def test_delta_stays_within_its_ball(model: Any, tokenizer: Any) -> None:
    r = request()
    h_O = state_at_subject(model, tokenizer, r)
    for factor in (0.1, 0.75):
        settings = TargetSettings(clamp_norm_factor=factor, loss_threshold=-1)
        z_O = plain_target(model, tokenizer, r, CONTEXTS, settings, LAYER)
        assert (z_O - h_O).norm().item() == pytest.approx(factor * h_O.norm().item(), rel=1e-4)


def test_it_stops_under_the_threshold_before_an_update(model: Any, tokenizer: Any) -> None:
    r = request()
    losses: list[float] = []
    plain_target(model, tokenizer, r, CONTEXTS, NO_STOP, LAYER, losses=losses)
    assert len(losses) == 20 and losses[-1] < losses[0]
    threshold = (losses[4] + losses[5]) / 2
    early: list[float] = []
    settings = TargetSettings(loss_threshold=threshold, clamp_norm_factor=4.0)
    plain_target(model, tokenizer, r, CONTEXTS, settings, LAYER, losses=early)
    assert early == pytest.approx(losses[: len(early)])
    assert early[-1] < threshold <= min(early[:-1])


# ------------------------------------------------------------------------------------- edits


def test_keys_are_averaged_group_by_group(model: Any, tokenizer: Any) -> None:
    alone = [plain_keys(model, tokenizer, [request()], [c], LAYER)[0] for c in CONTEXTS]
    together = plain_keys(model, tokenizer, [request()], CONTEXTS, LAYER)[0]
    torch.testing.assert_close(together, (alone[0] + (alone[1] + alone[2]) / 2) / 2)


@pytest.mark.parametrize("layers", [(2,), (1, 2)])
def test_without_a_prior_the_edited_model_has_z(
    model: Any, tokenizer: Any, layers: tuple[int, ...]
) -> None:
    """With λ → 0, the bare prompt as the only context and few facts, W k = z − rest exactly."""
    requests = [request("Eiffel Tower"), request("Old Bridge")]
    h_NO = plain_current(model, tokenizer, requests, LAYER)
    zs_NO = h_NO + 0.1 * torch.randn(h_NO.shape, generator=torch.Generator().manual_seed(1))
    moments = {layer: torch.eye(64, dtype=torch.float64) for layer in layers}
    plain_edit(model, tokenizer, requests, ["{}"], zs_NO, moments, 1e-9, layers)
    now_NO = plain_current(model, tokenizer, requests, LAYER)
    torch.testing.assert_close(now_NO, zs_NO, rtol=1e-3, atol=1e-4)


def test_one_layer_one_fact_has_the_closed_form_of_a_rank_one_update(
    model: Any, tokenizer: Any
) -> None:
    """Sherman–Morrison: Δ = r (C⁻¹k)ᵀ / (λ + kᵀC⁻¹k)."""
    r = request()
    moment, _ = plain_moments(model, tokenizer, ["The quick brown fox. " * 20], LAYER)
    moment += torch.eye(64)
    key_I = plain_keys(model, tokenizer, [r], CONTEXTS, LAYER)[0].double()
    h_O = state_at_subject(model, tokenizer, r).double()
    residual_O = torch.linspace(-1, 1, len(h_O), dtype=torch.float64)
    before = model.model.layers[LAYER].mlp.down_proj.weight.clone()
    deltas = plain_edit(
        model, tokenizer, [r], CONTEXTS, (h_O + residual_O)[None], {LAYER: moment}, 5.0, [LAYER]
    )
    solved_I = torch.linalg.inv(moment) @ key_I
    expected = torch.outer(residual_O, solved_I) / (5.0 + key_I @ solved_I)
    torch.testing.assert_close(deltas[LAYER], expected)
    after = model.model.layers[LAYER].mlp.down_proj.weight
    torch.testing.assert_close((after - before).double(), expected, rtol=1e-3, atol=1e-6)


def test_module_names_make_it_work_on_gpt2(tokenizer: Any) -> None:
    names = ModuleNames(
        block="transformer.h.{}", rewrite="transformer.h.{}.mlp.c_proj", transposed=True
    )
    model: Any = tiny_model("gpt2")
    r = request()
    before = plain_current(model, tokenizer, [r], LAYER, names=names)
    width = model.transformer.h[LAYER].mlp.c_proj.weight.shape[0]
    moments = {LAYER: torch.eye(width, dtype=torch.float64)}
    plain_edit(model, tokenizer, [r], ["{}"], before + 0.5, moments, 1e-9, [LAYER], names=names)
    after = plain_current(model, tokenizer, [r], LAYER, names=names)
    torch.testing.assert_close(after, before + 0.5, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- the real model


@pytest.mark.slow
@pytest.mark.skipif(not FACTS.is_file(), reason=f"{FACTS} is absent")
def test_on_smollm2_tokens_agree_and_an_edit_is_learnt(smollm2: Any) -> None:
    model, tokenizer = smollm2
    rows = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()[:200]]
    requests = [
        EditRequest(
            case_id=str(row["case_id"]),
            subject=row["subject"],
            prompt=row["prompt"],
            target_new=row["target_new"],
        )
        for row in rows
    ]
    contexts = ("{}", *FIXED_CONTEXTS)
    for r in requests:
        if plain_tokens(tokenizer, "{}", r.prompt, r.subject)[1] > 0:  # memedit refuses the sink
            assert_same_encoding(tokenizer, r, contexts)

    r = requests[0]
    zs_NO = plain_target(model, tokenizer, r, contexts, TargetSettings(), 9)[None]
    ids, _ = plain_tokens(tokenizer, "{}", r.prompt, r.subject)
    words = tokenizer(FACTS.read_text(encoding="utf-8")[:20_000])["input_ids"]
    windows = [words[i : i + 256] for i in range(0, 2048, 256)]
    moments = {layer: plain_moments(model, tokenizer, windows, layer)[0] for layer in (8, 9)}
    plain_edit(model, tokenizer, [r], contexts, zs_NO, moments, 100.0, (8, 9))
    with torch.no_grad():
        says = forward_logits(model, pad_right([ids]))[0, -1].argmax().item()
    assert says == plain_target_ids(tokenizer, r.target_new)[0]
