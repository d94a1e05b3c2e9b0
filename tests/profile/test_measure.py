"""Peaks of memory."""

from typing import Any

import pytest
import torch

from saelens_sparse.ops.common.cuda_graph import kept_by_graphs, record
from saelens_sparse.profile.measure import time_calls
from saelens_sparse.profile.trainers import release_memory


def test_what_graphs_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(total: int, allocated: int, **pool: Any) -> dict[str, Any]:
        return {"total_size": total, "allocated_size": allocated, **pool}

    segments = [
        segment(100, 60),
        segment(100, 60, segment_pool_id=(0, 0)),
        segment(50, 20, segment_pool_id=(0, 1)),
        segment(7, 0, segment_pool_id=(3, 0)),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert kept_by_graphs() == 30 + 7


@pytest.mark.gpu
@pytest.mark.parametrize("is_recorded_before", [True, False])
def test_a_peak_counts_a_graph_s_own_memory_once(is_recorded_before: bool) -> None:
    release_memory("cuda")  # what graphs of other tests have left
    x = torch.ones(2**20, device="cuda")
    stream = torch.cuda.Stream()

    def recorded() -> torch.cuda.CUDAGraph:
        return record(lambda: torch.cat([x] * 64).sum(), stream)[0]

    graph = recorded() if is_recorded_before else None

    def call() -> None:
        nonlocal graph
        graph = graph or recorded()
        graph.replay()

    timed = time_calls(call, "cuda", 2, untimed=0)
    assert timed.before_bytes is not None and timed.peak_bytes is not None
    added = timed.peak_bytes - timed.before_bytes
    assert 64 * x.nbytes <= added < 2 * 64 * x.nbytes
