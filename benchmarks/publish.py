"""What publishing moves, holds and takes: bytes, memory, time, throughput.

    python -m benchmarks.publish                            # everything: about 8 minutes
    python -m benchmarks.publish --only throughput --file-mb 256 --rounds 3

Three parts, each with processes of their own and, for S3, a SeaweedFS server of its own on this
machine, whose data are removed again:

folder: GPT-NeoX-20B's shape (46 shards, 41 GB, holes for weights) from a folder to a folder: peak
memory, time and what it takes of the disk.
s3: some of its blocks, from a prefix to a prefix: the bytes of all bodies, counted at a proxy;
then, without the proxy and in turns, the time against `aws s3 cp` of all of it down, the same patch
in place, and `aws s3 cp` of all of it up. Also the embedded default model's bytes: its edited
tensors are smaller than the smallest part.
throughput: one file, up and down, against `aws s3 cp`.

Predicted before the first run, for two cores that client and server share:
up 1.0003 times the edited tensors of NeoX (a bias and the header go along) and down 1.001 (64 KiB a
shard for headers); SmolLM2 up 3 times, all of it slack. Peak 650 MB, of which 360 are imports and
120 the updates. 46 shards in a folder: 25 s, 4.5 GB of disk. S3: half the time of the whole copy,
as this server copies no faster than it uploads. Throughput: read 1.0 of aws, upload 0.9, download
0.6 (it reads the file once more, to hash it).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.publish_sides import publish_locally, publish_on_s3
from benchmarks.publish_table import cells, show
from benchmarks.record import append_row, save_json
from benchmarks.throughput import compare_throughput
from workflows.models import resolve_model

PARTS = ("folder", "s3", "throughput")


def main() -> None:
    """Run the parts; print, store and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
    parser.add_argument("--data", type=Path, help="where to work; by default in /tmp")
    parser.add_argument("--rank", type=int, default=100, help="of the updates: facts written")
    parser.add_argument("--blocks", type=int, default=44, help="in the folder; 44 is the model")
    parser.add_argument("--s3-blocks", type=int, default=1, help="on S3: 1.2 GB, and 0.9 a block")
    parser.add_argument("--s3-rounds", type=int, default=2, help="turns of each side")
    parser.add_argument(
        "--no-model", action="store_true", help="leave out the default model's bytes"
    )
    parser.add_argument("--file-mb", type=int, default=512, help="of the file for throughput")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side, for throughput")
    args = parser.parse_args()
    # As Ctrl+C: what was made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    result: dict[str, Any] = {"rank": args.rank}
    with tempfile.TemporaryDirectory(prefix="memedit-publish-", dir=args.data) as made:
        data = Path(made)
        _check_room(data, args)
        if "folder" in args.only:
            result["folder"] = publish_locally(data, blocks=args.blocks, rank=args.rank)
        if "s3" in args.only:
            result["s3"] = publish_on_s3(
                data,
                blocks=args.s3_blocks,
                rank=args.rank,
                rounds=args.s3_rounds,
                model=None if args.no_model else resolve_model("smollm2").files.here,
            )
        if "throughput" in args.only:
            result["throughput"] = compare_throughput(
                data, size_mb=args.file_mb, rounds=args.rounds
            )
    show(result)
    save_json("publish", result)
    append_row("publish", cells(result))


def _check_room(data: Path, args: argparse.Namespace) -> None:
    """Refuse now what would fill the disk: a part's data are gone before the next begins."""
    # A base, a version, and a copy of the whole on the disk; others may write meanwhile.
    gb = {
        "folder": 5.0,  # the five edited shards; all else is holes or hard links
        "s3": 3.5 * (1.3 + 0.91 * args.s3_blocks),
        "throughput": args.file_mb / 1000 * 5,
    }
    needed = 1.5 * max(gb[part] for part in args.only)
    if (free := shutil.disk_usage(data).free / 1e9) < needed:
        sys.exit(f"{data}: {free:.0f} GB are free, {needed:.0f} are wanted; --data names a folder")


if __name__ == "__main__":
    main()
