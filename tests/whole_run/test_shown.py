"""A run taken apart, as a reader sees it."""

from pathlib import Path

from saelens_sparse.reports.presentation import plain_table
from saelens_sparse.whole_run.record import SAELENS_RUNNER
from saelens_sparse.whole_run.shown import draw_runs, run_notes, run_sentence, run_table
from tests.support.whole_runs import record

STOCK = record(model=20, step=170, architecture="topk", runner=SAELENS_RUNNER, busy_share=None)


def test_the_table_has_parts_shares_and_what_is_gained() -> None:
    rows = {row[0].strip(): row[1:] for row in run_table([STOCK, record()])}
    assert rows["ms per 4,096 tokens"] == [
        "topk, SAELens's runner",
        "topk_sparse, SparseTrainingRunner",
    ]
    assert rows["SAE step"] == ["170.0 (85%)", "70.0 (70%)"]
    assert rows["whole run"] == ["200.0", "100.0"]
    assert rows["tokens/s"] == ["20,480", "40,960"]
    assert rows["whole run is"] == ["", "2.00x as fast"]
    assert rows["SAE step is"] == ["", "2.43x as fast"]
    assert rows["device is busy"] == ["-", "90%"]
    assert "evals" not in rows
    assert "whole run is" not in plain_table(run_table([record()]))


def test_the_sentence_names_parts_by_their_size() -> None:
    assert run_sentence(record(evals=0.1)) == (
        "The run trains 40,919 tokens/s: SAE step 70%, language model 20%, store 8%, rest of the "
        "loop 2%; the device is busy 90% of the time"
    )


def test_notes_say_what_was_not_measured_and_why() -> None:
    slow = record(model_path="saelens", model_reason="it is hooked", whole_fillings=False)
    notes = " ".join(run_notes([slow], "cpu"))
    assert "no separate device" in notes
    assert "SAELens's path (it is hooked)" in notes
    assert "share is rough" in notes
    assert "No evals or logs count" in notes
    fine = " ".join(run_notes([record(evals=2.0)], "cuda"))
    assert "one eval takes 2.00 s, every 1,000 steps" in fine
    assert "the fast path" in fine
    assert "rough" not in fine and "separate" not in fine


def test_other_load_on_the_machine_shows() -> None:
    quiet = run_notes([record(model=20.0), record(model=22.0)], "cpu")
    assert not any("disturbed" in note for note in quiet)
    loud = run_notes([record(model=20.0), record(model=30.0)], "cpu")
    assert any("it took 20.0 and 30.0 ms: other load disturbed" in note for note in loud)
    assert not any("disturbed" in note for note in run_notes([STOCK, record(model=60.0)], "cpu"))


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw_runs([STOCK, record(evals=3.0)], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
