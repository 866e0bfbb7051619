"""A model spread over several devices: accelerate's hooks change no bit, and devices never mix.

There need be no GPU: hooks work on the CPU too, and `tests.pretended` follows where each tensor
would be.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook
from transformers import PreTrainedModel

from memedit.architecture import Architecture, architecture_of, probe_additivity
from memedit.config import TargetSettings
from memedit.errors import InputError
from memedit.files import Files, LocalFiles
from memedit.generate import greedy_continuations
from memedit.keys import KeyPass
from memedit.model import LoadedModel, ModelSpec, _placement, load_model
from memedit.moments import MomentAccumulator
from memedit.prompts import EncodedRequest, encode_request
from memedit.requests import EditRequest
from memedit.sampling import sample_windows
from memedit.scoring import Completion, score_completions
from memedit.solve import Update
from memedit.targets import optimise_targets
from memedit.worker import add_update
from tests.elsewhere import Elsewhere
from tests.pretended import MixedDevices, PretendedDevices, place_of, put
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

FAMILIES = ("llama", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "phi", "mistral")
LAYERS_EDITED = (1, 2)
CONTEXTS = ("{}", "Therefore I think. {}")
SETTINGS = TargetSettings(steps=4, lr=0.3)


def _requests() -> list[EncodedRequest]:
    facts = [
        ("{} is located in the city of", "The Eiffel Tower", "Rome"),
        ("{} was founded by", "Toyota", "Marie Curie"),
        ("The mother tongue of {} is", "Danielle Darrieux", "English"),
    ]
    return [
        encode_request(
            tiny_tokenizer(),
            EditRequest(case_id=str(i), prompt=p, subject=s, target_new=t),
            CONTEXTS,
        )
        for i, (p, s, t) in enumerate(facts)
    ]


def _everything(model: PreTrainedModel, arch: Architecture) -> dict[str, Any]:
    """What an edit does with a model, one thing after the other."""
    found: dict[str, Any] = {"probe": probe_additivity(model, arch, 1)}
    counted = MomentAccumulator(model, arch, layers=LAYERS_EDITED, count_0=True)
    counted.add([list(range(3, 40)), list(range(50, 80))])
    found |= {f"moment {n}": m.sum_II for n, m in counted.moments.items()}
    requests = _requests()
    for target in optimise_targets(model, arch, requests, layer=2, settings=SETTINGS):
        found[f"z {target.case_id}"] = target.z_O
    walk = KeyPass(model, arch, requests, last_layer=2)
    loaded = LoadedModel(model=model, tokenizer=tiny_tokenizer(), known_arch=arch)
    for layer in LAYERS_EDITED:
        keys = walk.at(layer)
        found |= {f"keys {layer}": keys.keys_NI, f"current {layer}": keys.current_NO}
        update = Update(
            layer=layer,
            left_NO=keys.current_NO.double() / 10,
            right_NI=keys.keys_NI.double() / 10,
        )
        add_update(loaded, update, torch.float32)
        weight: Any = arch.rewrite_module(model, layer).weight
        found[f"weight {layer}"] = weight.detach().clone()
    asked = [
        Completion(prompt_ids=(5, 6, 7), target_ids=(8, 9)),
        Completion(prompt_ids=(9,), target_ids=(3,)),
    ]
    found["scores"] = score_completions(model, arch, asked)
    found["says"] = greedy_continuations(model, tiny_tokenizer(), ["The capital", "Toyota"], 5)
    found["sampled"] = sample_windows(model, tiny_tokenizer(), rows=2, length=8, seed=1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_change_no_bit(family: str) -> None:
    model = tiny_model(family)
    arch = architecture_of(model.config)
    hooked = copy.deepcopy(model)
    dispatch_model(
        hooked,
        dict.fromkeys(_places(hooked), "cpu"),
        main_device="cpu",
        skip_keys=hooked._skip_keys_device_placement,
        force_hooks=True,
    )
    assert hasattr(arch.block(hooked, 0), "_hf_hook")
    _same(_everything(model, arch), _everything(hooked, arch))


def _same(plain: dict[str, Any], found: dict[str, Any], *, rtol: float = 0.0) -> None:
    assert plain.keys() == found.keys() and len(plain) == 15
    for name, value in plain.items():
        if name == "says" or name == "sampled":
            assert value == found[name]
        elif name == "scores":
            logprobs = [score.logprob for score in value]
            assert [score.logprob for score in found[name]] == pytest.approx(logprobs, rel=rtol)
        else:
            ours, theirs = torch.as_tensor(found[name]), torch.as_tensor(value)
            assert torch.allclose(ours, theirs, rtol=rtol, atol=rtol), name


def _places(model: PreTrainedModel) -> dict[str, int]:
    """Where accelerate puts the parts of a model that needs two devices."""
    sizes = [parameter.nbytes for parameter in {*model.parameters()}]
    blocks = model._no_split_modules
    rooms = {0: sum(sizes) * 85 // 100, 1: sum(sizes)}
    found = infer_auto_device_map(model, rooms, no_split_module_classes=blocks)
    places: dict[str, int] = dict(found)
    assert set(places.values()) == {0, 1}
    return places


def _pretended_places(model: PreTrainedModel) -> dict[str, str]:
    return {name: f"cpu:{place}" for name, place in _places(model).items()}


def _spread(family: str) -> tuple[PreTrainedModel, Architecture]:
    """A model over two pretended devices, with accelerate's hooks."""
    model = tiny_model(family)
    places = _pretended_places(model)
    with mock.patch.object(AlignDevicesHook, "init_hook", lambda _, module: module):
        dispatch_model(
            model, places, main_device="cpu:0", skip_keys=model._skip_keys_device_placement
        )
    for name, place in places.items():
        part: Any = operator.attrgetter(name)(model)
        put([*part.parameters(), *part.buffers()], place)
    return model, architecture_of(model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_devices_meet(family: str) -> None:
    model = tiny_model(family)
    plain = _everything(model, architecture_of(model.config))
    spread, arch = _spread(family)
    assert len({place_of(p) for p in spread.parameters()}) == 2
    with PretendedDevices():
        found = _everything(spread, arch)
    # The states of a prefix lie in two tensors, which is aligned otherwise: not every bit is equal.
    _same(plain, found, rtol=1e-5)


def test_a_mix_is_noticed() -> None:
    a, b, host = torch.ones(2), torch.ones(2), torch.tensor([1, 0])
    put([a], "cpu:0")
    put([b], "cpu:1")
    with PretendedDevices():
        assert place_of(a + b.to(a.device)) == a.device == torch.device("cpu:0")
        assert place_of(a[host] * torch.tensor(2.0)) == a.device
        for left, right in ((a, b), (a, host), (host, b)):
            with pytest.raises(MixedDevices):
                left * right
        with pytest.raises(MixedDevices):
            host[b.long()]


# ----------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("place", [LocalFiles, Elsewhere])
@pytest.mark.parametrize("until_layer", [None, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_device_map_loads_the_same_weights(
    family: str,
    until_layer: int | None,
    place: type[LocalFiles],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_tiny(tmp_path / "model", family)
    spec = ModelSpec(files=place(folder), until_layer=until_layer)
    plain = load_model(spec)
    places = _pretended_places(plain.model)
    monkeypatch.setattr("memedit.model._placement", lambda _: {"device_map": places})
    monkeypatch.setattr(AlignDevicesHook, "init_hook", lambda _, module: module)
    files: Files = place(folder)
    found = load_model(ModelSpec(files=files, until_layer=until_layer))
    assert found.model.hf_device_map == places
    assert hasattr(found.arch.block(found.model, 1), "_hf_hook")
    state = found.model.state_dict()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    if isinstance(files, Elsewhere):  # each byte is read once
        assert max(Counter(files.reads).values()) == 1


def test_several_gpus_share_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(files=LocalFiles(tmp_path), device="cuda", gpus=2)
    free = {0: 10, 1: 20, 2: 30, "cpu": 99}
    monkeypatch.setattr("memedit.model.get_max_memory", lambda: free)
    assert _placement(spec) == {"device_map": "balanced", "max_memory": {0: 10, 1: 20, "cpu": 99}}
    assert _placement(replace(spec, gpus=1)) == {"device_map": {"": "cuda"}}
    assert _placement(replace(spec, device="cpu")) == {}
    with pytest.raises(InputError, match="4 GPUs for a worker, and its process sees 3") as caught:
        _placement(replace(spec, gpus=4))
    assert caught.value.field == "gpus_per_worker"


def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    places = {**_pretended_places(tiny_model("llama")), "lm_head": "cpu"}
    monkeypatch.setattr("memedit.model._placement", lambda _: {"device_map": places})
    monkeypatch.setattr(AlignDevicesHook, "init_hook", lambda _, module: module)
    with pytest.raises(InputError, match="does not fit 2 GPUs"):
        load_model(ModelSpec(files=LocalFiles(folder), gpus=2))
