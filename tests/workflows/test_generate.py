"""`memedit generate` on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import POSITIONS, save_tiny
from tests.workflows.runs import memedit

PROMPTS = ("The capital of France is", "Big Ben")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


def test_the_continuations_are_greedy(base: Path) -> None:
    result = memedit("generate", "--model", base, *PROMPTS, "--tokens", 6, "--json").result
    assert result["model"] == str(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt, found in zip(PROMPTS, result["continuations"], strict=True):
        assert found["prompt"] == prompt
        ids = list(tokenizer(prompt)["input_ids"])
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected = str(tokenizer.decode(ids[-6:]))
        assert expected.startswith(found["continuation"]) and found["continuation"]


def test_for_people(base: Path) -> None:
    ran = memedit("generate", "--model", base, *PROMPTS, "--tokens", 3)
    assert ran.code == 0
    assert all(prompt in ran.stdout for prompt in PROMPTS)


def test_a_family_that_cannot_be_edited_can_be_tried(tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "mixtral", "mixtral")
    result = memedit("generate", "--model", mixture, "Rome is", "--tokens", 2, "--json").result
    assert result["continuations"][0]["continuation"]


def test_it_ends_where_the_model_reads_no_further(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2")
    start = "The year "
    room = POSITIONS - len(AutoTokenizer.from_pretrained(model)(start)["input_ids"])
    prompts = [start + "7" * (room - left) for left in (1, 0)]
    arguments = ("generate", "--model", model, "--tokens", 50, "--json")
    assert memedit(*arguments, "Rome is", prompts[0]).code == 0
    ran = memedit(*arguments, "Rome is", prompts[1])
    assert (ran.code, ran.error["field"]) == (2, "prompts")
    assert f"'{prompts[1][:40]}'" in ran.error["message"]
    assert f"{POSITIONS} tokens" in ran.error["message"]


def test_too_large_weights_are_no_bad_input(base: Path, tmp_path: Path) -> None:
    """They are finite, and the model's numbers are not: it fails while running."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data *= 1e38
    model.lm_head.weight.data *= 1e10
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "large")
    ran = memedit("generate", "--model", tmp_path / "large", "Rome is", "--json")
    assert (ran.code, ran.error["kind"]) == (1, "NumericalError")


def test_no_such_model(tmp_path: Path) -> None:
    ran = memedit("generate", "--model", tmp_path / "nowhere", "Rome is", "--json")
    assert ran.code == 2
    assert "nowhere" in ran.error["message"] + str(ran.error["source"])


@pytest.mark.parametrize("device", ["cuda:99999999999", "gpu"])
def test_no_such_device(base: Path, device: str) -> None:
    ran = memedit("generate", "--model", base, "Rome is", "--device", device, "--json")
    assert (ran.code, ran.error["field"]) == (2, "device")
