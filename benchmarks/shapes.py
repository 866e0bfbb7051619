"""Checkpoints of a real model's shape: its names, shapes and shards, with cheap content.

GPT-NeoX-20B as the hub has it: 46 shards of at most 1 GB in float16, 41.1 GB. In a folder the
shards are holes behind a real header, so they take no room; on S3 the same few random weights stand
again and again, which the storage copies by itself. Names and shapes are transformers' own.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from memedit.checkpoint import INDEX_NAME
from memedit.solve import Update

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

TILE_BYTES = 32 << 20
"""What is sent to S3; the rest of a shard is made of copies of it."""
WEIGHT = "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"
_PART_OF_STATE_DICT = {"lm_head.weight": "embed_out.weight"}
"""The checkpoint's name of what transformers calls otherwise."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A checkpoint without its content; every tensor is float16."""

    config: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, tuple[int, ...]]]
    """By file name, the shapes of its tensors, in the order of their bytes."""

    @cached_property
    def headers(self) -> dict[str, bytes]:
        """What each shard begins with."""
        return {name: _header(tensors) for name, tensors in self.shards.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each shard, its header included."""
        return {
            name: len(self.headers[name]) + sum(2 * math.prod(s) for s in tensors.values())
            for name, tensors in self.shards.items()
        }

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.sizes.values())

    @property
    def side_files(self) -> dict[str, bytes]:
        """The config and the index."""
        weight_map = {name: shard for shard, tensors in self.shards.items() for name in tensors}
        index = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
        return {
            "config.json": json.dumps(self.config).encode(),
            INDEX_NAME: json.dumps(index).encode(),
        }


def neox_20b(blocks: int = 44) -> Shape:
    """GPT-NeoX-20B, or the same with fewer blocks."""
    config = GPTNeoXConfig(
        vocab_size=50432,
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=blocks,
        num_attention_heads=64,
        max_position_embeddings=2048,
        dtype="float16",
        architectures=["GPTNeoXForCausalLM"],
    )
    with torch.device("meta"):
        state: dict[str, Tensor] = GPTNeoXForCausalLM(config).half().state_dict()
    state = {_PART_OF_STATE_DICT.get(name, name): tensor for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(state, max_shard_size="1GB")
    return Shape(
        config=config.to_dict(),
        # safetensors sorts what it writes: by dtype, then by name.
        shards={
            shard: {name: tuple(state[name].shape) for name in sorted(names)}
            for shard, names in sorted(split.filename_to_tensors.items())
        },
    )


def write_sparse(shape: Shape, folder: Path) -> None:
    """Write the checkpoint with zeros for weights, as files that take hardly any room."""
    folder.mkdir(parents=True)
    for name, content in shape.side_files.items():
        (folder / name).write_bytes(content)
    for name, header in shape.headers.items():
        with (folder / name).open("xb") as file:
            file.write(header)
            file.truncate(shape.sizes[name])


def upload(shape: Shape, s3: S3Client, bucket: str, prefix: str) -> None:
    """Put the checkpoint under a prefix, with finite random weights that cannot be compressed."""
    weights = torch.randn(TILE_BYTES // 2, generator=torch.Generator().manual_seed(0)) * 0.02
    array: Any = weights.half().view(torch.uint8).numpy()
    tile = array.tobytes()
    tile_key = f"{prefix}.tile"
    s3.put_object(Bucket=bucket, Key=tile_key, Body=tile)
    for name, content in shape.side_files.items():
        s3.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
    for name, header in shape.headers.items():
        where: Any = {"Bucket": bucket, "Key": f"{prefix}/{name}"}
        where["UploadId"] = s3.create_multipart_upload(**where)["UploadId"]
        left = shape.sizes[name]
        parts: list[Any] = []
        while left:
            number: Any = {"PartNumber": len(parts) + 1}
            if not parts or left < TILE_BYTES:  # the header, or the end
                body = (header + tile)[: min(left, TILE_BYTES)] if not parts else tile[:left]
                answer: Any = s3.upload_part(**where, **number, Body=body)
                left -= len(body)
            else:
                source: Any = {"CopySource": {"Bucket": bucket, "Key": tile_key}}
                answer = s3.upload_part_copy(**where, **number, **source)["CopyPartResult"]
                left -= TILE_BYTES
            parts.append({**number, "ETag": answer["ETag"]})
        s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    s3.delete_object(Bucket=bucket, Key=tile_key)


def made_updates(
    shapes: Mapping[str, Sequence[int]], *, rank: int, seed: int = 0
) -> dict[str, Update]:
    """For each weight [O, I] by its name, the update that an edit with `rank` facts has."""
    random = torch.Generator().manual_seed(seed)

    def rows(width: int) -> Tensor:
        return 0.01 * torch.randn(rank, width, generator=random, dtype=torch.float64)

    return {
        name: Update(layer=layer, left_NO=rows(outputs), right_NI=rows(inputs))
        for layer, (name, (outputs, inputs)) in enumerate(shapes.items())
    }


def _header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sides in tensors.items():
        start, end = end, end + 2 * math.prod(sides)
        fields[name] = {"dtype": "F16", "shape": list(sides), "data_offsets": [start, end]}
    raw = json.dumps(fields, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
