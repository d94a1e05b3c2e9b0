"""The benchmark of caches."""

from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cache import PARTS, CacheSession
from benchmarks.cache_cases import CASES
from benchmarks.rows import DisagreementError, load_rows
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
CONTENDERS = [
    "disk_write", "write", "verify", "read", "read_cold", "disk_read", "memory_read",
    "saelens_format_stock_first", "saelens_format_stock_second", "saelens_format_fast_first",
    "saelens_format_fast_second", "step", "train", "train_cold", "model", "write_from_model",
]  # fmt: skip


def test_all_parts_are_measured(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--device=cpu", "--rounds=2", "--commit=abc", f"--out={out}", "--cases=tiny"]
    assert main(["cache", *common]) == 0
    rows = load_rows([out])
    assert [row["contender"] for row in rows] == CONTENDERS
    for row in rows:
        assert (row["operation"], row["case"], row["status"]) == ("cache", "tiny", "ok")
        assert row["ms"] > 0
        if "gb_s" in row:
            assert row["ms"] == pytest.approx(4096 * 32 / row["gb_s"] / 1e6, rel=1e-3) or (
                row["contender"].startswith("saelens")
            )
    said = capsys.readouterr().out
    assert "write_from_model" in said
    assert main(["report", str(out)]) == 0
    assert "read_cold" in capsys.readouterr().out
    assert len(PARTS) == 5


def test_a_cache_that_differs_from_its_source_is_not_timed(tmp_path: Path) -> None:
    session = CacheSession(CASES["tiny"], tmp_path, "cpu", rounds=1)
    assert [row["contender"] for row in session.write()] == CONTENDERS[:3]
    session.source[5] += 1.0
    with pytest.raises(DisagreementError, match="not those that were written"):
        list(session.read())


def test_rows_say_which_they_are() -> None:
    case = CASES["tiny"]
    session = CacheSession(case, Path("unused"), "cpu", rounds=1)
    first = session.source[:, 0] * 65536 + session.source[:, 1] * 256 + session.source[:, 2]
    assert torch.equal(first, torch.arange(len(session.source)).float())
    assert torch.equal(session.source[:, :3].half().float(), session.source[:, :3])
