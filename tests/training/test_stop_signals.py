"""When signals raise, and when they wait."""

import os
import signal
import threading
from collections.abc import Generator

import pytest

from saelens_sparse.training.interruption import StopSignals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers() -> Generator[list[int]]:
    """Signals that reach the test's own handlers."""
    reached: list[int] = []
    before = [signal.signal(number, lambda n, _: reached.append(n)) for number in SIGNALS]
    yield reached
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_between_steps_a_signal_raises_at_once(
    number: signal.Signals, handlers: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals() as signals:
        signals.begin_step()
        signals.end_step()
        with pytest.raises(KeyboardInterrupt, match=number.name):
            send(number)
        assert signals.between_steps
    assert capfd.readouterr().err == f"\n{number.name}: stopping\n"
    send(number)
    assert handlers == [number], "the handlers of before are back"


@pytest.mark.parametrize("number", SIGNALS)
def test_within_a_step_it_waits_for_the_end(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals() as signals:
        signals.begin_step()
        send(number)
        assert "after this step" in capfd.readouterr().err
        assert not signals.between_steps
        with pytest.raises(KeyboardInterrupt):
            signals.end_step()
        assert signals.between_steps


def test_only_a_second_interrupt_stops_a_step() -> None:
    for first in SIGNALS:
        with StopSignals() as signals:
            signals.begin_step()
            send(first)
            send(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            assert not signals.between_steps


def test_what_is_held_ends_whatever_comes(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        with signals.held(), signals.held():
            for number in SIGNALS * 3:
                send(number)
        with pytest.raises(KeyboardInterrupt):
            signals.end_step()
    assert capfd.readouterr().err.count("when what is being saved is whole") == 6


def stopped_in_its_last_step(error: Exception | None = None) -> None:
    with StopSignals() as signals:
        signals.begin_step()
        send(signal.SIGTERM)
        if error is not None:
            raise error


def test_what_has_not_raised_raises_in_the_end() -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped_in_its_last_step()
    with StopSignals():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # the first is on its way, or was taken care of


def test_an_error_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ValueError, match="mine"):
        stopped_in_its_last_step(ValueError("mine"))


def test_what_is_allowed_is_stopped_within_a_step() -> None:
    reached: list[int] = []

    def evaluate(value: int) -> int:
        reached.append(value)
        if value == 2:
            send(signal.SIGTERM)
        return value

    with StopSignals() as signals:
        stoppable = signals.allowed_during(evaluate)
        signals.begin_step()
        assert stoppable(1) == 1
        assert not signals.between_steps
        with pytest.raises(KeyboardInterrupt):
            stoppable(2)
        assert signals.between_steps
        signals.begin_step()
        with pytest.raises(KeyboardInterrupt):
            stoppable(3)
        assert reached == [1, 2]


def test_ignored_signals_stay_ignored() -> None:
    """As in a job in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals():
        send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_changes_no_handlers(handlers: list[int]) -> None:
    entered, sent = threading.Event(), threading.Event()

    def run() -> None:
        with StopSignals() as signals:
            signals.begin_step()
            entered.set()
            sent.wait()
            signals.end_step()

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait()
    send(signal.SIGINT)
    sent.set()
    thread.join()
    assert handlers == [signal.SIGINT]
