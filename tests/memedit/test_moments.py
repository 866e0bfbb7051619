"""Second moments: sums, merging, the estimate of their error, windows and files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memedit.architecture import architecture_of
from memedit.errors import InputError
from memedit.moments import (
    MomentAccumulator,
    SecondMoment,
    Spread,
    check_moment,
    load_moment,
    save_moment,
    symmetric_product,
    windows_of,
)
from tests.plain import plain_moments
from tests.tiny import tiny_model, tiny_tokenizer

WINDOWS = [[(7 * i + 3 * j) % 380 + 3 for j in range(20 + i % 3)] for i in range(12)]


def _collect(windows: list[list[int]], *, count_0: bool = True) -> dict[int, SecondMoment]:
    model = tiny_model("llama")
    arch = architecture_of(model.config)
    accumulator = MomentAccumulator(model, arch, layers=(1, 2), count_0=count_0)
    for start in range(0, len(windows), 4):
        accumulator.add(windows[start : start + 4])
    return accumulator.moments


@pytest.mark.parametrize("count_0", [True, False])
def test_equal_to_the_plain_ones_window_by_window(count_0: bool) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for layer, moment in _collect(WINDOWS, count_0=count_0).items():
        plain_II, tokens = plain_moments(model, tokenizer, WINDOWS, layer, position_0=count_0)
        assert moment.tokens == tokens
        assert (moment.value_II - plain_II).norm() <= 1e-6 * plain_II.norm()
        assert torch.equal(moment.sum_II, moment.sum_II.T)


def test_merging_parts_gives_the_whole() -> None:
    whole, first, second = _collect(WINDOWS), _collect(WINDOWS[:8]), _collect(WINDOWS[8:])
    for layer in whole:
        merged = first[layer].merge(second[layer])
        torch.testing.assert_close(merged.sum_II, whole[layer].sum_II, rtol=1e-12, atol=0)
        assert merged.tokens == whole[layer].tokens
        assert merged.trace_0 == pytest.approx(whole[layer].trace_0)
        assert merged.spread.error == pytest.approx(whole[layer].spread.error)
    with pytest.raises(ValueError, match="merged"):
        whole[1].merge(whole[2])


def test_position_0_has_its_own_part_of_the_trace() -> None:
    with_0, without_0 = _collect(WINDOWS)[1], _collect(WINDOWS, count_0=False)[1]
    part = float(with_0.sum_II.trace() - without_0.sum_II.trace())
    assert with_0.trace_0 == pytest.approx(part, rel=1e-5)
    assert without_0.trace_0 == 0
    assert with_0.trace_without_position_0 < with_0.trace


def test_the_estimated_error_is_that_of_a_mean_of_known_spread() -> None:
    """Batches whose C is I plus noise of known size: the estimate must find that size."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    spread: Spread | None = None
    total, batches = torch.zeros(64, 64, dtype=torch.float64), 40
    for _ in range(batches):
        noise = torch.randn(64, 64, generator=generator, dtype=torch.float64) * 0.3
        c_II = torch.eye(64, dtype=torch.float64) + (noise + noise.T) / 2
        total += c_II
        mean_SS = probes.T @ c_II @ probes
        part = Spread(batches=1, mean_SS=mean_SS, squares_SS=torch.zeros_like(mean_SS))
        spread = part if spread is None else spread.merge(part)
    assert spread is not None
    mean = total / batches
    true_error = float((mean - torch.eye(64)).norm() / mean.norm())
    assert spread.error == pytest.approx(true_error, rel=0.3)


def test_the_error_is_unknown_before_two_batches() -> None:
    assert _collect(WINDOWS[:4])[1].spread.error == float("inf")


@given(st.integers(1, 70), st.integers(1, 30))
def test_symmetric_product_is_the_product(width: int, tokens: int) -> None:
    keys = torch.randn(tokens, width, generator=torch.Generator().manual_seed(width))
    torch.testing.assert_close(symmetric_product(keys), keys.T @ keys, rtol=1e-4, atol=1e-4)


@given(
    st.lists(st.integers(0, 90), max_size=8),
    st.integers(4, 16),
    st.integers(1, 200),
    st.sampled_from([None, -1]),
)
def test_windows_hold_each_token_once_at_most(
    lengths: list[int], window: int, tokens: int, separator: int | None
) -> None:
    documents = [[1000 * d + i for i in range(n)] for d, n in enumerate(lengths)]
    found = list(windows_of(documents, window=window, tokens=tokens, seed=0, separator=separator))
    flat = [token for part in found for token in part if token != -1]
    assert len(flat) == len(set(flat))
    assert all(len(part) == window for part in found[:-1])
    assert all(window / 2 <= len(part) <= window for part in found[1:])
    given = sum(map(len, found))
    assert given < tokens + window
    if given < tokens:  # all is there but less than half a window
        lost = sum(lengths) - len(flat)
        assert lost < window / 2 if found else lost < 2
    for part in found:
        for before, after in pairwise(part):
            joined = separator is None and before // 1000 != after // 1000
            assert -1 in (before, after) or after == before + 1 or joined


def test_windows_come_from_all_documents_before_any_gives_two() -> None:
    documents = [[d] * 100 for d in range(5)]
    first = [part[0] for part in windows_of(documents, window=10, tokens=50, seed=3)]
    assert sorted(first) == [0, 1, 2, 3, 4]


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    moment = _collect(WINDOWS)[2]
    save_moment(tmp_path / "m.safetensors", moment, metadata={"digest": "abc"})
    path = tmp_path / "m.safetensors"
    loaded, metadata = load_moment(path), check_moment(path)
    assert torch.equal(loaded.sum_II, moment.sum_II)
    assert (loaded.layer, loaded.tokens, loaded.trace_0) == (2, moment.tokens, moment.trace_0)
    assert loaded.spread.error == moment.spread.error
    assert metadata == {"digest": "abc"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_moment(path, _collect(WINDOWS)[1], metadata={})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"m\.safetensors"):
        load_moment(path)
