"""The benchmark of what trains dead latents."""

from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import dead_latents
from benchmarks.__main__ import main
from benchmarks.dead_latents import batches_of, load_activations, train
from benchmarks.rows import load_rows

SIZES = ["--d-sae=64", "--k=4", "--batch=32", "--steps=30", "--window=2", "--device=cpu"]


@pytest.fixture
def activations(tmp_path: Path) -> Path:
    path = tmp_path / "activations.safetensors"
    directions = torch.randn(40, 16)
    codes = (torch.rand(500, 40) < 0.1) * torch.rand(500, 40)
    save_file({"rows": (codes @ directions).half()}, path)
    return path


def test_each_loss_leaves_a_row(
    activations: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dead_latents", *SIZES, f"--activations={activations}", "--seeds=2"]
    assert main([*command, f"--out={out}", "--commit=abc"]) == 0
    rows = load_rows([out])
    assert [(row["seed"], row["contender"]) for row in rows] == [
        (seed, loss) for seed in (0, 1) for loss in ("auxk", "ghost", "none")
    ]
    for row in rows:
        assert (row["status"], row["d_in"], row["d_sae"]) == ("ok", 16, 64)
        assert 0 <= row["revived"] <= row["ever_dead"] <= 64
        assert row["ms_with_dead"] > 0
        assert row["explained_variance"] < 1
    # They begin alike, and go on apart where latents are dead.
    assert len({row["mse"] for row in rows}) == 6
    assert "dead latents revived" in capsys.readouterr().out


def test_the_coefficient_is_that_of_both_losses(activations: Path, out: Path) -> None:
    command = ["dead_latents", *SIZES, f"--activations={activations}", "--coefficient=0"]
    assert main([*command, f"--out={out}", "--commit=abc"]) == 0
    assert len({row["mse"] for row in load_rows([out])}) == 1


def test_a_failure_is_said(
    activations: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(dead_latents.LOSSES, "none", {"dead_latent_loss": "nothing"})
    command = ["dead_latents", *SIZES, f"--activations={activations}", "--losses=none,auxk"]
    assert main([*command, f"--out={out}", "--commit=abc"]) == 1
    failed, good = load_rows([out])
    assert "dead_latent_loss must be one of auxk, ghost" in failed["message"]
    assert good["status"] == "ok"
    assert "dead_latent_loss must be" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(
    tmp_path: Path, activations: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ([f"--activations={tmp_path / 'none'}"], "none is no safetensors file and no folder"),
        ([f"--activations={activations}", "--batch=501"], "--batch: 501 is more than the 500"),
    ):
        assert main(["dead_latents", *SIZES, *options, f"--out={out}", "--commit=abc"]) == 2
        assert message in capsys.readouterr().err


def test_activations_are_those_of_a_file_or_a_cache(tmp_path: Path, activations: Path) -> None:
    rows = load_activations(activations)
    assert rows.shape == (500, 16)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1).mean().item(), 4.0)
    prompts = rows.view(50, 10, 16)
    cached = {"model.layers.1": prompts.tolist(), "token_ids": torch.zeros(50, 10).long().tolist()}
    datasets.Dataset.from_dict(cached).save_to_disk(tmp_path / "cached")
    torch.testing.assert_close(load_activations(tmp_path / "cached"), rows)


def test_batches_pass_over_all_rows_in_an_order_of_the_seed() -> None:
    rows = torch.arange(10.0).unsqueeze(1)
    batches = batches_of(rows, 5, 0, "cpu")
    first, second = (torch.cat([next(batches), next(batches)]).flatten() for _ in range(2))
    assert not torch.equal(first, second)
    for one in (first, second):
        assert torch.equal(one.sort().values, rows.flatten())
    assert torch.equal(next(batches_of(rows, 5, 0, "cpu")), first[:5].unsqueeze(1))
    assert not torch.equal(next(batches_of(rows, 5, 1, "cpu")), first[:5].unsqueeze(1))


def test_what_became_of_dead_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent 0 is never dead, 1 dies and comes back, 2 stays dead, 3 dies at the end."""
    before_each = [[], [1], [1, 2], [2]]
    monkeypatch.setattr(dead_latents, "UNTIMED_STEPS", 1)
    monkeypatch.setattr(dead_latents, "now", iter([0, 9, 9, 10, 10, 12, 12, 16]).__next__)
    monkeypatch.setattr(dead_latents, "now", lambda _, clock=dead_latents.now: clock())

    def mask(latents: list[int]) -> torch.Tensor:
        return torch.isin(torch.arange(4), torch.tensor(latents, dtype=torch.int64))

    class Scripted:
        n_training_steps = 0

        @property
        def dead_neurons(self) -> torch.Tensor:
            n = self.n_training_steps
            return mask(before_each[n] if n < len(before_each) else [2, 3])

        def step(self, batch: torch.Tensor) -> Any:
            return SimpleNamespace(losses={"mse_loss": batch.sum() + self.n_training_steps})

    row = train(Scripted(), repeat(torch.ones(2)), 4, "cpu")  # pyright: ignore[reportArgumentType]
    assert (row["ever_dead"], row["revived"], row["dead"]) == (2, 1, 2)
    assert (row["mse"], row["steps_with_dead"]) == (5.0, 3)
    assert (row["ms"], row["ms_with_dead"]) == (None, 2000.0)
