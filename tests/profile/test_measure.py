"""Peaks of memory."""

from typing import Any

import pytest
import torch

from saelens_sparse.ops.common.cuda_graph import record
from saelens_sparse.profile.measure import peak_bytes


def test_what_graphs_keep_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(total: int, allocated: int, **pool: Any) -> dict[str, Any]:
        return {"total_size": total, "allocated_size": allocated, **pool}

    segments = [
        segment(100, 60),
        segment(100, 60, segment_pool_id=(0, 0)),
        segment(50, 20, segment_pool_id=(0, 1)),
        segment(7, 0, segment_pool_id=(3, 0)),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    assert peak_bytes() == 1000 + 30 + 7


@pytest.mark.gpu
def test_a_graph_s_own_memory_counts() -> None:
    x = torch.ones(2**20, device="cuda")
    graph, result = record(lambda: torch.cat([x] * 64).sum(), torch.cuda.Stream())
    torch.cuda.reset_peak_memory_stats()
    without = torch.cuda.max_memory_allocated()
    graph.replay()
    assert result.item() == 2**26
    assert torch.cuda.max_memory_allocated() <= without + 2**20
    assert peak_bytes() >= without + 64 * x.nbytes
