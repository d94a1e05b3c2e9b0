"""When SIGINT and SIGTERM stop a training: between two steps, and never while files are written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self, TypeVar

_T = TypeVar("_T")


class StopSignals:
    """
    Holds SIGINT and SIGTERM back until they do no damage, then raises KeyboardInterrupt.

    Between two steps, as while a batch is awaited, a signal raises at once. Within a step it
    raises at the step's end; a second SIGINT raises at once. Within `held`, every signal waits.
    Each signal prints one line that says what follows.

    A context manager: inside of it, its handlers replace those of the process. A signal that has
    not raised by its end raises there. Python handles signals in its main thread; entering in
    another one changes nothing. Signals that the process ignores are still ignored.
    """

    def __init__(self) -> None:
        self._asked_by: str | None = None
        self._has_raised = False
        self._in_step = False
        self._holds = 0
        self._replaced: dict[signal.Signals, Any] = {}

    @property
    def between_steps(self) -> bool:
        """Whether no step is under way, so that the state of the training is whole."""
        return not self._in_step

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: a handler that Python has not set and cannot put back.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._replaced[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()
        if error_type is None and self._asked_by is not None and not self._has_raised:
            self._raise()

    def begin_step(self) -> None:
        """From here on, a signal waits for the end of the step."""
        self._in_step = True

    def end_step(self) -> None:
        """
        From here on, a signal raises at once.

        Raises:
            KeyboardInterrupt: there was a signal during the step.
        """
        self._in_step = False
        if self._asked_by is not None:
            self._raise()

    def allowed_during(self, call: Callable[..., _T]) -> Callable[..., _T]:
        """A function like `call`, which a signal stops at once although it is called in a step."""

        def stoppable(*args: Any, **kwargs: Any) -> _T:
            self.end_step()
            result = call(*args, **kwargs)
            self.begin_step()
            return result

        return stoppable

    @contextmanager
    def held(self) -> Generator[None]:
        """Within, signals are noted and nothing else."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def _raise(self) -> None:
        self._has_raised = True
        raise KeyboardInterrupt(f"stopped by {self._asked_by}")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        is_second_interrupt = number == signal.SIGINT and self._asked_by is not None
        self._asked_by = self._asked_by or name
        if self._holds > 0:
            _say(f"{name}: stopping when what is being saved is whole")
        elif is_second_interrupt or not (self._in_step or self._has_raised):
            _say(f"{name}: stopping")
            self._raise()
        elif not self._has_raised:
            _say(f"{name}: stopping after this step; SIGINT (Ctrl-C) again: now, nothing is saved")


def _say(line: str) -> None:
    # A handler must not print: the program may be in the middle of printing.
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
