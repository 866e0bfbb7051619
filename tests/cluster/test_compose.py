"""How an object is made of parts: every byte once, by the storage's rules, and few of them sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.compose import (
    MAX_COPY_BYTES,
    MAX_PARTS,
    MIN_PART_BYTES,
    PART_BYTES,
    Part,
    plan_parts,
)

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
STORAGE_COPY_BYTES = 5 * GIB
Ranges = Sequence[tuple[int, int]]

# Lengths around the rules' own numbers, where mistakes by one are made.
LENGTHS = st.one_of(
    st.integers(0, 3),
    st.sampled_from([MIN_PART_BYTES, 2 * MIN_PART_BYTES, PART_BYTES, MAX_COPY_BYTES]).flatmap(
        lambda n: st.integers(n - 2, n + 2)
    ),
    st.integers(0, 40 * MIB),
    st.integers(0, 3 * GIB),
)


@st.composite
def edited_objects(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A size and ranges in it: gaps and edits in turn, any of which may be empty."""
    ranges, position = [], 0
    for gap, size in draw(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=12)):
        ranges.append((position + gap, size))
        position += gap + size
    return position + draw(LENGTHS), ranges


def check_rules(size_bytes: int, ranges: Ranges, parts: Sequence[Part]) -> None:
    """What S3 asks of parts, and what a caller relies on."""
    assert [p.start for p in parts[:1]] == [0] * len(parts[:1])
    assert all(before.end == after.start for before, after in pairwise(parts))
    assert (parts[-1].end if parts else 0) == size_bytes
    assert all(p.size_bytes > 0 for p in parts) or size_bytes == 0
    assert all(p.size_bytes >= MIN_PART_BYTES for p in parts[:-1])
    assert all(p.size_bytes <= (MAX_COPY_BYTES if p.copied else 5 * GIB) for p in parts)
    assert len(parts) <= MAX_PARTS
    # Both are sorted, so one walk finds every overlap of a copied part with an edit.
    edited = iter([(start, start + size) for start, size in ranges if size])
    edit = next(edited, None)
    for part in (p for p in parts if p.copied):
        while edit is not None and edit[1] <= part.start:
            edit = next(edited, None)
        assert edit is None or edit[0] >= part.end, f"{part} copies the old bytes of {edit}"


def uploaded(parts: Sequence[Part]) -> int:
    return sum(p.size_bytes for p in parts if not p.copied)


def slack_bytes(ranges: Ranges) -> int:
    """The bound: for each edited range at most one part of the least size beside its own bytes."""
    return MIN_PART_BYTES * sum(1 for _, size in ranges if size)


@given(edited_objects())
@settings(deadline=None, max_examples=300)
@example((0, []))
@example((MIN_PART_BYTES, [(0, 1)]))
@example((MIN_PART_BYTES + 1, [(0, 1)]))
@example((2 * MIN_PART_BYTES, [(MIN_PART_BYTES - 1, 1)]))
@example((100 * MIB, [(100 * MIB - 1, 1)]))
def test_parts_keep_the_rules_and_the_bound(thing: tuple[int, list[tuple[int, int]]]) -> None:
    size_bytes, ranges = thing
    parts = plan_parts(size_bytes, ranges)
    check_rules(size_bytes, ranges, parts)
    edited = sum(size for _, size in ranges)
    if edited or size_bytes >= MIN_PART_BYTES:
        assert uploaded(parts) <= edited + slack_bytes(ranges)


@given(edited_objects())
@settings(deadline=None)
def test_without_copies_everything_is_uploaded(
    thing: tuple[int, list[tuple[int, int]]],
) -> None:
    size_bytes, ranges = thing
    parts = plan_parts(size_bytes, ranges, can_copy=False)
    check_rules(size_bytes, ranges, parts)
    assert uploaded(parts) == size_bytes


@given(LENGTHS, st.lists(st.just((0, 0)), max_size=2))
def test_without_edits_everything_is_copied(size_bytes: int, ranges: Ranges) -> None:
    parts = plan_parts(size_bytes, ranges)
    check_rules(size_bytes, ranges, parts)
    # What is smaller than a part is one PUT.
    assert all(p.copied for p in parts) or (size_bytes < MIN_PART_BYTES and len(parts) == 1)


@given(
    st.integers(1, 3_000),
    st.integers(1, 12 * MIB),
    st.integers(1, 12 * MIB),
    st.integers(0, 6 * GIB),
)
@example(10_000, MIB, 12 * MIB, 0)
@example(9_000, 11 * MIB, 5 * MIB, 5 * GIB)
@example(20_000, 64 * MIB, 1, TIB)
@settings(deadline=None, max_examples=25)
def test_many_edits_do_not_make_too_many_parts(
    count: int, gap: int, size: int, rest_bytes: int
) -> None:
    ranges = [(i * (gap + size) + gap, size) for i in range(count)]
    size_bytes = count * (gap + size) + rest_bytes
    check_rules(size_bytes, ranges, plan_parts(size_bytes, ranges))


HUGE = {
    "100 GB, nothing new": (100 * 10**9, [(0, 0)]),
    "100 GB, a little": (100 * 10**9, [(60 * 10**9, 500 * MIB)]),
    "100 GB, all new": (100 * 10**9, [(8, 100 * 10**9 - 8)]),
    "100 GB, every expert of a layer": (
        100 * 10**9,
        [(i * 100 * MIB, 20 * MIB) for i in range(900)],
    ),
    "5 TiB, nothing new": (5 * TIB, []),
    "5 TiB, a little": (5 * TIB, [(3 * TIB, 1)]),
    "5 TiB, 80 GiB in the middle": (5 * TIB, [(2 * TIB, 80 * GIB)]),
    "5 TiB, half": (5 * TIB, [(TIB, 5 * TIB // 2)]),
    "5 TiB, all new": (5 * TIB, [(0, 5 * TIB)]),
    "5 TiB, a thousand large edits": (5 * TIB, [(i * 5 * GIB, GIB) for i in range(1_000)]),
}


@pytest.mark.parametrize("can_copy", [True, False])
@pytest.mark.parametrize("name", HUGE)
def test_huge_objects(name: str, can_copy: bool) -> None:
    size_bytes, ranges = HUGE[name]
    parts = plan_parts(size_bytes, ranges, can_copy=can_copy)
    check_rules(size_bytes, ranges, parts)
    # A part to be sent is held in memory, eight at once.
    assert max((p.size_bytes for p in parts if not p.copied), default=0) <= GIB
    if can_copy:
        assert uploaded(parts) <= sum(n for _, n in ranges) + slack_bytes(ranges)


def shown(parts: Sequence[Part]) -> list[tuple[str, float]]:
    """Kinds and sizes in MiB."""
    return [("copy" if p.copied else "upload", p.size_bytes / MIB) for p in parts]


@pytest.mark.parametrize(
    ("size_mib", "ranges_mib", "expected"),
    [
        (0, [], []),
        (1, [], [("upload", 1)]),
        (5, [], [("copy", 5)]),
        (2 * 1024, [], [("copy", 1024), ("copy", 1024)]),
        # An edit that is long enough stands between two copies, and nothing more is sent.
        (40, [(10, 6)], [("copy", 10), ("upload", 6), ("copy", 24)]),
        # One that is too short takes from the copy behind it.
        (40, [(10, 1)], [("copy", 10), ("upload", 5), ("copy", 25)]),
        # All of it, where too little for a copy would be left before the next edit ...
        (40, [(10, 1), (19, 6)], [("copy", 10), ("upload", 15), ("copy", 15)]),
        # ... but the object's end may be a short part of its own.
        (18, [(10, 1)], [("copy", 10), ("upload", 5), ("copy", 3)]),
        (14, [(10, 1)], [("copy", 10), ("upload", 4)]),
        (20, [(10, 6)], [("copy", 10), ("upload", 6), ("copy", 4)]),
        # Too little before the first edit, or between two, goes along.
        (40, [(4, 8)], [("upload", 12), ("copy", 28)]),
        (40, [(10, 6), (20, 5)], [("copy", 10), ("upload", 15), ("copy", 15)]),
        (40, [(10, 6), (16, 6)], [("copy", 10), ("upload", 12), ("copy", 18)]),
        # The last bytes of the object may be a short part.
        (40, [(39, 1)], [("copy", 39), ("upload", 1)]),
        (40, [(0, 1)], [("upload", 5), ("copy", 35)]),
        # Uploads are cut into parts that stay long enough.
        (50, [(10, 17)], [("copy", 10), ("upload", 8.5), ("upload", 8.5), ("copy", 23)]),
    ],
)
def test_by_hand(
    size_mib: int, ranges_mib: list[tuple[int, int]], expected: list[tuple[str, float]]
) -> None:
    ranges = [(start * MIB, size * MIB) for start, size in ranges_mib]
    assert shown(plan_parts(size_mib * MIB, ranges)) == expected


def test_the_bound_is_nearly_reached() -> None:
    """So that nobody states a better one without a better plan."""
    ranges = [(i * MIN_PART_BYTES - 1, 1) for i in range(1, 50)]
    sent = uploaded(plan_parts(100 * MIN_PART_BYTES, ranges))
    assert 0.99 * slack_bytes(ranges) < sent - len(ranges) <= slack_bytes(ranges)


def test_numbers_of_the_storage() -> None:
    assert MIN_PART_BYTES == 5 * MIB and MAX_COPY_BYTES <= STORAGE_COPY_BYTES
    # Cut in two, a part that is too long must give two that are long enough.
    assert PART_BYTES >= 2 * MIN_PART_BYTES and MAX_COPY_BYTES >= 2 * MIN_PART_BYTES
