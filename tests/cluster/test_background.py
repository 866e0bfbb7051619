"""Writes beside the work: all of them done at the end, and no error lost."""

from __future__ import annotations

import threading
import time

import pytest

from cluster import background
from cluster.background import Background


def test_all_is_done_when_the_block_ends() -> None:
    done: list[int] = []

    def write(number: int) -> None:
        time.sleep(0.001)
        done.append(number)

    with Background() as made:
        for number in range(50):
            made.do(write, number)
    assert sorted(done) == list(range(50))


def fail() -> None:
    raise OSError("disk full")


def test_an_error_comes_with_the_next_call() -> None:
    def until_it_comes(made: Background) -> None:
        made.do(fail)
        for _ in range(10_000):
            made.do(time.sleep, 0.001)

    with Background() as made, pytest.raises(OSError, match="disk full"):
        until_it_comes(made)


def test_an_error_comes_at_the_end() -> None:
    with pytest.raises(OSError, match="disk full"), Background() as made:
        made.do(fail)


def test_another_error_is_not_hidden_and_what_was_begun_is_done() -> None:
    done = threading.Event()
    with pytest.raises(KeyboardInterrupt), Background() as made:
        made.do(lambda: (time.sleep(0.05), done.set()))
        made.do(fail)
        raise KeyboardInterrupt
    assert done.is_set()


def test_results_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 3)
    gate = threading.Event()
    threading.Timer(0.2, gate.set).start()
    with Background() as made:
        for _ in range(3):
            made.do(gate.wait)
        assert not gate.is_set()
        made.do(gate.wait)
        assert gate.is_set()
