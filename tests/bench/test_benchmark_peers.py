"""Benchmark arms of other libraries."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from typing_extensions import override

from benchmarks import forward, peers, train_step
from saelens_sparse.profile.cases import (
    DICTIONARY_LEARNING,
    FLOAT32,
    SPARSE,
    SPARSIFY,
    STEP_CASES,
    STOCK,
    Case,
)
from saelens_sparse.profile.trainers import prepare_inputs
from saelens_sparse.reports.results import ResultsFile, environment
from tests.bench.test_benchmark import one_thread, run_tiny, step_contest

__all__ = ["one_thread"]

TINY = STEP_CASES["tiny"]
ALIVE = replace(TINY, name="alive", dead_fraction=0.0)


class PlainTopK(peers.Peer):
    """What a peer is: a Top-K SAE that selects by pre-activation, and a loss of its own scale."""

    names: ClassVar[dict[str, tuple[str, bool]]] = {
        "W_enc": ("encoder.weight", True),
        "b_enc": ("encoder.bias", False),
        "W_dec": ("decoder.weight", True),
        "b_dec": ("decoder.bias", False),
    }
    note = "twice the loss"
    gradient_factor = 1.0

    @override
    @classmethod
    def load(cls, device: str) -> Any:
        return torch

    @override
    def build(self) -> torch.nn.Module:
        case = self.case
        self.encoder = torch.nn.Linear(case.d_in, case.d_sae)
        self.decoder = torch.nn.Linear(case.d_sae, case.d_in)
        module = torch.nn.Module()
        module.encoder, module.decoder = self.encoder, self.decoder
        self.optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        return module

    @override
    def encode(self, x: torch.Tensor) -> Any:
        pre_acts = self.encoder(x - self.decoder.bias)
        values, latents = pre_acts.topk(cast(int, self.case.k))
        return torch.zeros_like(pre_acts).scatter(-1, latents, values.relu())

    @override
    def decode(self, activations: Any) -> torch.Tensor:
        return self.decoder(activations)

    @override
    def loss_scale(self, x: torch.Tensor) -> float:
        return 0.5

    @override
    def hold_dead(self) -> None: ...

    @override
    def train_step(self, x: torch.Tensor) -> torch.Tensor:
        reconstruction = self.decode(self.encode(x))
        loss = 2 * (reconstruction - x).square().sum(-1).mean()
        (self.gradient_factor * loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class WronglyTrained(PlainTopK):
    gradient_factor = 1.1


PLAIN = replace(SPARSIFY, name="plain", peer="torch")


REAL = [arm for arm in (SPARSIFY, DICTIONARY_LEARNING) if peers.peer_problem(arm, "cpu") is None]
TESTED_PEERS = [PLAIN, *REAL]


@pytest.fixture
def plain_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "plain", PlainTopK)


@pytest.mark.usefixtures("plain_peer")
@pytest.mark.parametrize("arm", TESTED_PEERS, ids=lambda arm: arm.name)
@pytest.mark.parametrize("case", [TINY, ALIVE], ids=lambda case: case.name)
def test_peers_are_timed_once_their_first_step_is_stocks(arm: Any, case: Case, tmp_path: Path):
    steps = step_contest(tmp_path / "rows.jsonl")
    steps.run(case, FLOAT32, [STOCK, arm])
    _, row = steps.results.rows
    assert (row["arm"], row["status"], row["checked"]) == (arm.name, "ok", True)
    assert row["note"]
    assert row["peer"].startswith(f"{arm.peer} ")
    gradients = {f"gradient of {name}" for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    checked = {"mse_loss", "reconstruction"} | (gradients if case is ALIVE else set[str]())
    assert row["differences"].keys() == checked
    # Far below the floors: norms, layouts and scales are accounted for.
    assert max(row["differences"].values()) < 1e-5


@pytest.mark.usefixtures("plain_peer")
@pytest.mark.parametrize("arm", TESTED_PEERS, ids=lambda arm: arm.name)
def test_peers_take_part_in_forward_and_backward(arm: Any, tmp_path: Path):
    results = ResultsFile(tmp_path / "rows.jsonl", environment("cpu", "abc"))
    passes = forward.ForwardContest(results, device="cpu", steps=1, warmup_train=2)
    passes.run(forward.ForwardContest.cases["tiny"], FLOAT32, [STOCK, arm])
    rows = [row for row in results.rows if row["arm"] == arm.name]
    assert [row["operation"] for row in rows] == list(passes.operations)
    assert all(row["status"] == "ok" and row["checked"] for row in rows)
    assert max(rows[0]["differences"].values()) < 1e-5


def test_a_peer_with_other_gradients_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(peers.PEERS, "plain", WronglyTrained)
    steps = step_contest(tmp_path / "rows.jsonl")
    steps.run(ALIVE, FLOAT32, [STOCK, PLAIN])
    row = steps.results.rows[-1]
    assert (row["status"], row["checked"]) == ("disagrees", False)
    assert "gradient of W_enc is off by" in row["message"]


@pytest.mark.parametrize("arm", TESTED_PEERS, ids=lambda arm: arm.name)
def test_peers_leave_the_inputs_as_they_are(arm: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(peers.PEERS, "plain", PlainTopK)
    inputs = prepare_inputs(ALIVE, FLOAT32, "cpu", warmup_train=2)
    before = {name: value.clone() for name, value in inputs.weights.items()}
    peers.build_peer(arm, ALIVE, FLOAT32, "cpu", inputs).rehearse(inputs.batches[0])
    torch.testing.assert_close(inputs.weights, before, rtol=0, atol=0)


def test_an_absent_peer_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    absent = replace(SPARSIFY, peer="no-such-distribution")
    monkeypatch.setattr(train_step.StepContest, "arms", (STOCK, SPARSE, absent))
    rows = run_tiny(train_step.main, "tiny", tmp_path / "rows.jsonl", "--arms=sparsify")
    assert [row["arm"] for row in rows] == ["stock"]
    assert "sparsify is left out: no-such-distribution is not installed" in capsys.readouterr().out


def test_peers_are_for_topk_and_for_precisions_that_they_have():
    assert not SPARSIFY.takes(STEP_CASES["tiny_jumprelu"], FLOAT32)
    assert peers.Sparsify.trains_in(FLOAT32, "cpu")
    assert not peers.Sparsify.trains_in(FLOAT32, "cuda")
