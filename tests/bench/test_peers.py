"""Other libraries as contenders."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
import torch
from typing_extensions import override

from benchmarks.__main__ import COMMANDS, run_benchmark
from benchmarks.cases import CASES, NamedCase
from benchmarks.contenders import DICTIONARY_LEARNING, SPARSIFY, STOCK, Contender
from benchmarks.harness import FORWARD, STEP, Session
from benchmarks.peers import Peer, Sparsify
from benchmarks.rows import Row
from saelens_sparse.profile.cases import FLOAT32
from saelens_sparse.profile.trainers import prepare_inputs

TINY = CASES["tiny"]
ALIVE = replace(TINY, name="alive", dead_fraction=0.0)


class PlainTopK(Peer):
    """What a peer is: a Top-K SAE that selects by pre-activation, and a loss of its own scale."""

    distribution = "torch"
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
    def make_sae(self) -> torch.nn.Module:
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
        values, latents = pre_acts.topk(int(self.case.sparsity))
        return torch.zeros_like(pre_acts).scatter(-1, latents, values.relu())

    @override
    def decode(self, activations: Any) -> torch.Tensor:
        return self.decoder(activations)

    @override
    def loss_scale(self, x: torch.Tensor) -> float:
        return 0.5

    @override
    def hold_dead(self, latents: torch.Tensor) -> None: ...

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


PLAIN = Contender("plain", peer=PlainTopK)
REAL = [
    one for one in (SPARSIFY, DICTIONARY_LEARNING) if one.peer and one.peer.problem("cpu") is None
]
TESTED_PEERS = [PLAIN, *REAL]


@pytest.mark.parametrize("contender", TESTED_PEERS, ids=lambda one: one.name)
@pytest.mark.parametrize("case", [TINY, ALIVE], ids=lambda case: case.name)
def test_peers_are_timed_once_their_first_step_is_stocks(
    contender: Contender, case: NamedCase, session: Callable[..., Session]
):
    steps = session()
    steps.run(case, FLOAT32, [STOCK, contender])
    _, row = steps.results.rows
    assert (row["arm"], row["status"], row["checked"]) == (contender.name, "ok", True)
    assert row["note"]
    assert row["peer"].startswith(f"{cast(Any, contender.peer).distribution} ")
    gradients = {f"gradient of {name}" for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    checked = {"mse_loss", "reconstruction"} | (gradients if case is ALIVE else set[str]())
    assert row["differences"].keys() == checked
    # Far below the floors: norms, layouts and scales are accounted for.
    assert max(row["differences"].values()) < 1e-5


@pytest.mark.parametrize("contender", TESTED_PEERS, ids=lambda one: one.name)
def test_peers_take_part_in_forward_and_backward(
    contender: Contender, session: Callable[..., Session]
):
    passes = session(FORWARD)
    passes.run(TINY, FLOAT32, [STOCK, contender])
    rows = [row for row in passes.results.rows if row["arm"] == contender.name]
    assert [row["operation"] for row in rows] == list(FORWARD.operations)
    assert all(row["status"] == "ok" and row["checked"] for row in rows)
    assert max(rows[0]["differences"].values()) < 1e-5


def test_a_peer_with_other_gradients_is_not_timed(session: Callable[..., Session]):
    steps = session()
    steps.run(ALIVE, FLOAT32, [STOCK, replace(PLAIN, peer=WronglyTrained)])
    row = steps.results.rows[-1]
    assert (row["status"], row["checked"]) == ("disagrees", False)
    assert "gradient of W_enc is off by" in row["message"]


@pytest.mark.parametrize("contender", TESTED_PEERS, ids=lambda one: one.name)
def test_peers_leave_the_inputs_as_they_are(contender: Contender):
    inputs = prepare_inputs(ALIVE, FLOAT32, "cpu", warmup_train=2)
    before = {name: value.clone() for name, value in inputs.weights.items()}
    contender.build(ALIVE, FLOAT32, "cpu", inputs).rehearse()
    torch.testing.assert_close(inputs.weights, before, rtol=0, atol=0)


class Absent(PlainTopK):
    distribution = "no-such-distribution"


def test_an_absent_peer_is_left_out_with_the_reason(
    run: Callable[..., list[Row]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    absent = Contender("sparse", peer=Absent)
    benchmark = replace(STEP, contenders=(STOCK, absent))
    monkeypatch.setitem(COMMANDS, "step", lambda argv: run_benchmark(benchmark, argv))
    rows = run("step", "tiny")
    assert [row["arm"] for row in rows] == ["stock"]
    assert "sparse is left out: no-such-distribution is not installed" in capsys.readouterr().out


def test_peers_are_for_topk_and_for_precisions_that_they_have():
    assert not SPARSIFY.takes(CASES["tiny_jumprelu"], FLOAT32)
    assert Sparsify.trains_in(FLOAT32, "cpu")
    assert not Sparsify.trains_in(FLOAT32, "cuda")
