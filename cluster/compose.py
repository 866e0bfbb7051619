"""How an object with some new bytes is made of parts: copied where it can be, else uploaded.

Pure arithmetic over byte ranges, by the rules of S3: every part but the last has at least 5 MiB,
none more than 5 GiB, and there are at most 10,000. Makes no request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

MIN_PART_BYTES = 5 << 20
MAX_COPY_BYTES = 1 << 30
"""Less than the storage allows (5 GiB), so that large copies go on side by side; only an object
beyond 7 TiB has larger ones."""
MAX_PARTS = 10_000
PART_BYTES = 16 << 20
"""Size of uploaded parts, unless there would be too many of them."""


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `end` of the object; `copied` from the same bytes of the source."""

    start: int
    end: int
    copied: bool

    @property
    def size_bytes(self) -> int:
        """Bytes in it."""
        return self.end - self.start


def plan_parts(
    size_bytes: int, ranges: Sequence[tuple[int, int]], *, can_copy: bool = True
) -> list[Part]:
    """Cover an object by parts in their order; every byte of `ranges` is in an uploaded one.

    Beside the bytes of `ranges`, at most `MIN_PART_BYTES` for each of them are uploaded, unless
    they are so many that there would be too many parts.

    Args:
        size_bytes: Of the object, and of the source.
        ranges: (offset, size) of the new bytes, ascending, without overlap.
        can_copy: Whether the source lies on the storage's side.
    """
    edited = [(offset, offset + size) for offset, size in ranges if size]
    copy_bytes = max(MAX_COPY_BYTES, -(-size_bytes // (MAX_PARTS * 3 // 4)))
    least_copy_bytes = MIN_PART_BYTES
    while True:
        regions = [(0, size_bytes, False)]
        if can_copy:
            regions = _long_enough(_regions(size_bytes, edited, least_copy_bytes), size_bytes)
        uploaded = [end - start for start, end, copied in regions if not copied]
        copies = sum(-(-(end - start) // copy_bytes) for start, end, copied in regions if copied)
        # Each of the uploads may have one part more than its share.
        if (spare := MAX_PARTS - copies - len(uploaded)) > 0:
            upload_bytes = max(PART_BYTES, -(-sum(uploaded) // spare))
            return list(_split(regions, upload_bytes, copy_bytes))
        least_copy_bytes *= 2  # too many small edits: what lies between them goes along


_Region = tuple[int, int, bool]


def _regions(
    size_bytes: int, edited: Sequence[tuple[int, int]], least_copy_bytes: int
) -> list[_Region]:
    """What to copy and what to upload; what lies between two edits and is too short goes along."""
    found: list[_Region] = []
    position = 0
    for start, end in (*edited, (size_bytes, size_bytes)):
        last = start == size_bytes
        if start > position:
            # The last part may be short, if something stands before it.
            copied = start - position >= least_copy_bytes or (last and bool(found))
            found.append((position, start, copied))
        if end > start:
            found.append((start, end, False))
        position = end
    return _joined(found)


def _joined(regions: Sequence[_Region]) -> list[_Region]:
    """Neighbours of one kind as one."""
    joined: list[_Region] = []
    for start, end, copied in regions:
        if joined and joined[-1][2] == copied:
            start = joined.pop()[0]
        joined.append((start, end, copied))
    return joined


def _long_enough(regions: list[_Region], size_bytes: int) -> list[_Region]:
    """Let uploads that are too short for a part take bytes from the copy that follows."""
    done: list[_Region] = []
    rest = list(regions)
    while rest:
        start, end, copied = rest.pop(0)
        short = MIN_PART_BYTES - (end - start)
        if copied or short <= 0 or end == size_bytes:
            done.append((start, end, copied))
            continue
        copy_start, copy_end, _ = rest.pop(0)  # two uploads are never neighbours
        taken = end + short
        left = copy_end - taken
        if left >= MIN_PART_BYTES or (left > 0 and copy_end == size_bytes):
            done.append((start, taken, False))
            rest.insert(0, (taken, copy_end, True))
        else:
            # Too little would be left to copy; the next upload, if any, then begins here.
            rest = _joined([(start, copy_end, False), *rest])
        assert copy_start == end
    return done


def _split(regions: Sequence[_Region], upload_bytes: int, copy_bytes: int) -> Iterator[Part]:
    for start, end, copied in regions:
        count = max(1, -(-(end - start) // (copy_bytes if copied else upload_bytes)))
        marks = [start + (end - start) * i // count for i in range(count + 1)]
        for first, last in pairwise(marks):
            yield Part(first, last, copied)
