"""Clocks that divide time among parts."""

import threading

import pytest

from saelens_sparse.whole_run import clock
from saelens_sparse.whole_run.clock import PartClock, covered


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's clock, in seconds, as the test sets it."""
    moment = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: moment[0])
    return moment


def test_each_moment_is_of_the_innermost_part(ticks: list[float]) -> None:
    parts = PartClock("cpu", "rest")
    with parts.part("store"):  # before the start nothing counts
        ticks[0] += 5
    parts.start()
    ticks[0] += 1
    with parts.part("store"):
        ticks[0] += 2
        with parts.part("model"):
            ticks[0] += 4
        ticks[0] += 8
    ticks[0] += 16
    assert parts.stop() == {"rest": 17_000, "store": 10_000, "model": 4_000}


def test_the_rest_changes_its_name(ticks: list[float]) -> None:
    parts = PartClock("cpu", "rest")
    parts.start()
    ticks[0] += 1
    parts.rest_is("logging")
    ticks[0] += 2
    with parts.part("store"):
        parts.rest_is("rest")
        ticks[0] += 4
    ticks[0] += 8
    assert parts.stop() == {"rest": 9_000, "logging": 2_000, "store": 4_000}


def test_a_part_ends_with_an_error(ticks: list[float]) -> None:
    parts = PartClock("cpu", "rest")
    parts.start()

    def fail() -> None:
        with parts.part("store"):
            ticks[0] += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    ticks[0] += 2
    assert parts.stop() == {"store": 1_000, "rest": 2_000}


def test_other_threads_are_not_seen(ticks: list[float]) -> None:
    parts = PartClock("cpu", "rest")
    parts.start()

    def work() -> None:
        with parts.part("model"):
            ticks[0] += 3

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert parts.stop() == {"rest": 3_000}


def test_spans_that_overlap_count_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5
