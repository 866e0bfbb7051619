"""What publishing is measured on: checkpoints under a prefix, and what of them is edited.

Knows where things lie on the server and which names an edit changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GPTNeoXConfig

from benchmarks.shapes import WEIGHT, Shape, neox_20b
from memedit.defaults import defaults_for
from tests.s3.server import SeaweedServer

MEMORY_FACTOR, MEMORY_BYTES = 3, 200_000_000
"""Of the largest edited tensor, and beyond: what publishing may hold at most."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A checkpoint under a prefix, and what of it is edited."""

    name: str
    prefix: str
    names: list[str]


def at(server: SeaweedServer, name: str) -> str:
    """The location of a name in the server's bucket."""
    return f"s3://{server.bucket}/{name}"


def edited_names(shape: Shape) -> list[str]:
    """The weights that an edit changes: of the default layers, or of the last one there is."""
    blocks = shape.config["num_hidden_layers"]
    layers = defaults_for(GPTNeoXConfig(**neox_20b().config), 100).settings.layers
    return [WEIGHT.format(layer) for layer in layers if layer < blocks] or [WEIGHT.format(0)]


def edited_names_of_llama(model: Path) -> list[str]:
    """The weights that an edit of a Llama changes."""
    layers = defaults_for(AutoConfig.from_pretrained(model), 100).settings.layers
    return [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]


def memory_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The peak of a process that publishes, against what it may be."""
    allowed = MEMORY_FACTOR * found["largest_edited_bytes"] + MEMORY_BYTES
    peak = found["memory_bytes"]["peak"]
    return {**found["memory_bytes"], "allowed": allowed, "met": peak <= allowed}
