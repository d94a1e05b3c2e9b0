"""What the progress bar of a training says of its pace."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

WINDOW_SECONDS = 10.0
UPDATE_SECONDS = 1.0


class RecentPace:
    """
    Tokens per second of a training over its last ten seconds, or over a longer last step.

    All that the run does in them counts, evals and checkpoints too: tokens that are left, divided
    by it, are the time that is left. Nothing waits for a GPU.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()
        self._shown = float("-inf")

    def show(self, bar: Any, n_tokens: int) -> None:
        """
        Show the pace behind a bar of tqdm, once a second at most.

        Args:
            bar: It is drawn again.
            n_tokens: That have been trained on so far.
        """
        moment = time.perf_counter()
        self._marks.append((moment, n_tokens))
        while len(self._marks) > 2 and self._marks[1][0] <= moment - WINDOW_SECONDS:
            self._marks.popleft()
        (begin, before), *_ = self._marks
        if moment > begin and moment - self._shown >= UPDATE_SECONDS:
            self._shown = moment
            pace = (n_tokens - before) / (moment - begin)
            bar.set_postfix_str(f"tokens/s={shortened(pace)}")


def shortened(pace: float) -> str:
    """Three digits with the prefix that suits them, such as "41.2k"."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if pace >= 0.9995 * factor:
            scaled = pace / factor
            return f"{scaled:.{0 if scaled >= 99.95 else 1}f}{prefix}"
    return f"{pace:.0f}"
