"""A checkpoint whose weights are not here yet: its sizes from config.json and the index.

Knows how an index names tensors and how a model's modules do; reads no weight file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from memedit.architecture import skeleton
from memedit.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from memedit.errors import InputError
from memedit.files import Files
from memedit.shards import TensorInfo


def index_without_weights(files: Files) -> dict[str, Any] | None:
    """The index of a folder that holds none of the files it names; None for any other folder."""
    present = files.sizes()
    if SINGLE_NAME in present or not {"config.json", INDEX_NAME} <= present.keys():
        return None
    try:
        index = json.loads(files.read(INDEX_NAME))
        shards = set(index["weight_map"].values())
        plain = all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards)
    except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # opening the checkpoint says what is wrong
    if not shards or not plain or shards & present.keys():
        return None
    return dict(index)


def outline(files: Files, config: PretrainedConfig, index: Mapping[str, Any]) -> Checkpoint:
    """What the weight files would hold, from the config: every block has the sizes of the first.

    Tensors that the modules do not have (buffers, a head under another name) share what is left of
    the index's total.
    """
    shapes = {name: tuple(t.shape) for name, t in skeleton(config).state_dict().items()}
    shapes |= {name.partition(".")[2]: shape for name, shape in shapes.items()}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    # The first number in a name is that of the block.
    found = {n: shapes.get(re.sub(r"\.\d+\.", ".0.", n, count=1)) for n in index["weight_map"]}
    sizes = {n: math.prod(s) * dtype.itemsize for n, s in found.items() if s is not None}
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    rest = max(0, total - sum(sizes.values())) if isinstance(total, int) else 0
    each = rest // max(1, len(found) - len(sizes))
    tensors = {
        name: TensorInfo(
            shard=index["weight_map"][name],
            dtype=dtype,
            shape=shape or (),
            offset=0,
            size_bytes=sizes.get(name, each),
        )
        for name, shape in found.items()
    }
    return Checkpoint(
        files=files,
        config=config.to_dict(),
        tensors=tensors,
        shards=tuple(sorted({info.shard for info in tensors.values()})),
        has_index=True,
    )
