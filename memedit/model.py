"""Loading a model and its tokenizer for editing: what to load, on which device, in which dtype.

Knows transformers' loaders; does not know model names (`workflows.models`) or checkpoints' bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from memedit.architecture import Architecture, architecture_of, skeleton, truncated
from memedit.checkpoint import Checkpoint, side_files_of
from memedit.errors import InputError, MemeditError, UnsupportedModelError
from memedit.files import Files, files_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a worker loads; small enough to be sent anywhere.

    `until_layer` loads blocks 0 … until_layer only, which is all that statistics need.
    """

    files: Files
    device: str = "cpu"
    dtype: str = "float32"
    gpus: int = 1
    """GPUs over which the blocks are spread, the first ones that the process sees."""
    until_layer: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    editable: bool = True
    """Whether a family that cannot be edited is refused; evaluating one is fine."""
    published: Mapping[str, str] = field(default_factory=dict)
    """sha256 that tensors must have, beside those of the checkpoint's own manifest."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer and where it keeps things."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    known_arch: Architecture | None
    """None for a family that cannot be edited."""

    @property
    def arch(self) -> Architecture:
        """Where a model that can be edited keeps things."""
        assert self.known_arch is not None, "loaded for evaluation only"
        return self.known_arch


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading bars and its notes on keys that were left out on purpose."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(place: Files | Path) -> PretrainedConfig:
    """The checkpoint's config.

    Raises:
        InputError: transformers does not know such a model, or it needs remote code.
    """
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(_folder(place))
    except MemeditError:
        raise
    except Exception as error:  # transformers raises those of several libraries
        raise InputError(
            f"the config could not be read: {error}", source=files_of(place).location
        ) from error
    return config


def positions_of(config: PretrainedConfig) -> float:
    """How many positions the model reads; infinite where its family sets no limit."""
    text_config = config.get_text_config(decoder=True)
    return getattr(text_config, "max_position_embeddings", None) or math.inf


def load_tokenizer(place: Files | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        InputError: There is none, or it needs code that memedit does not run.
    """
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_folder(place))
    except MemeditError:
        raise
    except Exception as error:
        raise InputError(
            f"no tokenizer could be loaded: {error}", source=files_of(place).location
        ) from error
    last = tokenizer("a")["input_ids"][-1]
    if last == tokenizer.eos_token_id:
        raise InputError(
            "the tokenizer puts an end-of-text token behind every prompt, so nothing can follow "
            "it; set add_eos_token to false in tokenizer_config.json",
            source=files_of(place).location,
        )
    return tokenizer


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a checkpoint for editing.

    Raises:
        InputError: The folder holds no model that transformers can load without remote code.
        UnsupportedModelError: The family cannot be edited.
    """
    config = load_config(spec.files)
    arch: Architecture | None = None
    try:
        arch = architecture_of(config, spec.overrides)
    except UnsupportedModelError:
        if spec.editable:
            raise
    if spec.until_layer is not None:
        config = truncated(config, spec.until_layer + 1)
    place = spec.files.location
    try:
        with quiet():
            model, report = _loaded(spec, config)
    except (MemeditError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"the model could not be loaded: {error}", source=place) from error
    _check_report(report, place)
    model.eval()
    return LoadedModel(model=model, tokenizer=load_tokenizer(spec.files), known_arch=arch)


def check_loadable(place: Files | Path) -> None:
    """Check that transformers would load a checkpoint; no weight is read.

    Raises:
        InputError: It would not, or would fill a tensor with random numbers; says why.
    """
    files = files_of(place)
    config = load_config(files)
    load_tokenizer(files)
    tensors = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in Checkpoint.open(files).tensors.items()
    }
    try:
        with quiet():
            kind: Any = type(skeleton(config))
            _, report = kind.from_pretrained(
                None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True
            )
    except Exception as error:
        raise InputError(
            f"the model could not be loaded: {error}", source=files.location
        ) from error
    _check_report(report, files.location)


def _check_report(report: Mapping[str, Any], place: str) -> None:
    # transformers would fill them with random numbers, and say so in a log only.
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"the checkpoint lacks {len(missing)} of the model's tensors, {missing[0]!r} for one",
            source=place,
        )


def _loaded(spec: ModelSpec, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report on its keys."""
    options: dict[str, Any] = {
        "config": config,
        "dtype": DTYPES[spec.dtype],
        "use_safetensors": True,
        "output_loading_info": True,
        **_placement(spec),
    }
    loaded: Any
    if spec.files.here is not None:
        _checkpoint(spec).check_published()
        loaded = AutoModelForCausalLM.from_pretrained(spec.files.here, **options)
    else:  # without a path, only the class of the model itself takes tensors
        kind: Any = type(skeleton(config))
        loaded = kind.from_pretrained(None, state_dict=_lazy_tensors(spec), **options)
        # A path would have brought it; chat models have more tokens that end a text there.
        if spec.files.size("generation_config.json") is not None:
            loaded[0].generation_config = GenerationConfig.from_pretrained(_folder(spec.files))
    model, report = loaded
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())):
        raise InputError(
            f"the model does not fit {spec.gpus} GPUs; give each worker more",
            field="gpus_per_worker",
        )
    return model, report


def _placement(spec: ModelSpec) -> dict[str, Any]:
    """Where transformers puts each tensor as soon as it is read: never a second copy in memory.

    Over several GPUs accelerate spreads the weights evenly, and never splits a block.
    """
    if torch.device(spec.device).type == "cpu":
        return {}
    if spec.gpus == 1:
        return {"device_map": {"": spec.device}}
    free_bytes = get_max_memory()
    rooms = {i: free_bytes[i] for i in range(spec.gpus) if i in free_bytes}
    if len(rooms) < spec.gpus:
        raise InputError(
            f"{spec.gpus} GPUs for a worker, and its process sees {len(rooms)}",
            field="gpus_per_worker",
        )
    # What is left over goes to the host, which `_loaded` refuses.
    return {"device_map": "balanced", "max_memory": {**rooms, "cpu": free_bytes["cpu"]}}


class _LazyTensor:
    """Read when transformers asks for its elements, as it does with a slice of a local file."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.read(self._name)[index]


def _lazy_tensors(spec: ModelSpec) -> dict[str, _LazyTensor]:
    """The tensors of a checkpoint that is not on this machine; only those of the model are read."""
    checkpoint = _checkpoint(spec)
    return {name: _LazyTensor(checkpoint, name) for name in checkpoint.names}


def _checkpoint(spec: ModelSpec) -> Checkpoint:
    pinned = torch.device(spec.device).type == "cuda" and torch.cuda.is_available()
    checkpoint = Checkpoint.open(spec.files, pinned=pinned)
    return replace(checkpoint, published={**checkpoint.published, **spec.published})


def _folder(place: Files | Path) -> Path:
    """A folder with the files of a checkpoint that transformers reads from a disk only."""
    files = files_of(place)
    return files.here or files.folder(side_files_of(files))
