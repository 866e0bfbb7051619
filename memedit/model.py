"""Loading a model and its tokenizer for editing: what to load, on which device, in which dtype.

Knows transformers' loaders; does not know model names (`workflows.models`) or checkpoints' bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from memedit.architecture import Architecture, architecture_of, truncated
from memedit.errors import InputError, UnsupportedModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a worker loads; small enough to be sent anywhere.

    `until_layer` loads blocks 0 … until_layer only, which is all that statistics need.
    """

    folder: Path
    device: str = "cpu"
    dtype: str = "float32"
    until_layer: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    editable: bool = True
    """Whether a family that cannot be edited is refused; evaluating one is fine."""


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


def load_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's config.

    Raises:
        InputError: transformers does not know such a model, or it needs remote code.
    """
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"the config could not be read: {error}", source=folder) from error
    return config


def positions_of(config: PretrainedConfig) -> float:
    """How many positions the model reads; infinite where its family sets no limit."""
    text_config = config.get_text_config(decoder=True)
    return getattr(text_config, "max_position_embeddings", None) or math.inf


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        InputError: There is none, or it needs code that memedit does not run.
    """
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"no tokenizer could be loaded: {error}", source=folder) from error
    last = tokenizer("a")["input_ids"][-1]
    if last == tokenizer.eos_token_id:
        raise InputError(
            "the tokenizer puts an end-of-text token behind every prompt, so nothing can follow "
            "it; set add_eos_token to false in tokenizer_config.json",
            source=folder,
        )
    return tokenizer


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a checkpoint for editing.

    Raises:
        InputError: The folder holds no model that transformers can load without remote code.
        UnsupportedModelError: The family cannot be edited.
    """
    config = load_config(spec.folder)
    arch: Architecture | None = None
    try:
        arch = architecture_of(config, spec.overrides)
    except UnsupportedModelError:
        if spec.editable:
            raise
    if spec.until_layer is not None:
        config = truncated(config, spec.until_layer + 1)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                spec.folder,
                config=config,
                dtype=DTYPES[spec.dtype],
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"the model could not be loaded: {error}", source=spec.folder) from error
    model, report = loaded
    # transformers would fill them with random numbers, and say so in a log only.
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"the checkpoint lacks {len(missing)} of the model's tensors, {missing[0]!r} for one",
            source=spec.folder,
        )
    model.eval().to(spec.device)
    return LoadedModel(model=model, tokenizer=load_tokenizer(spec.folder), known_arch=arch)
