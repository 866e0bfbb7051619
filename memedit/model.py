"""Loading a model and its tokenizer for editing: what to load, on which device, in which dtype.

Knows transformers' loaders; does not know model names (`workflows.models`) or checkpoints' bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from memedit.architecture import Architecture, architecture_of, truncated
from memedit.errors import InputError

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


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer and where it keeps things."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arch: Architecture


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
    return tokenizer


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a checkpoint for editing.

    Raises:
        InputError: The folder holds no model that transformers can load without remote code.
        UnsupportedModelError: The family cannot be edited.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(spec.folder)
            arch = architecture_of(config, spec.overrides)
            if spec.until_layer is not None:
                config = truncated(config, spec.until_layer + 1)
            model = AutoModelForCausalLM.from_pretrained(
                spec.folder, config=config, dtype=DTYPES[spec.dtype], use_safetensors=True
            )
    except (OSError, ValueError) as error:
        raise InputError(f"the model could not be loaded: {error}", source=spec.folder) from error
    model.eval().to(spec.device)
    return LoadedModel(model=model, tokenizer=load_tokenizer(spec.folder), arch=arch)
