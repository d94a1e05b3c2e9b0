"""Training with a float8 screen: the same SAE as without, what it reports, where it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig

from saelens_sparse.architectures import ARCHITECTURES, Architecture
from saelens_sparse.choice import availability
from saelens_sparse.ops.common.precision import FLOAT8
from saelens_sparse.training.runners import SparseTrainingRunner
from tests.support.architectures import Subject, subjects
from tests.support.float8 import set_deviations
from tests.support.runs import runner_config
from tests.support.saes import superposed_rows
from tests.support.trainers import own_trainer, state_of, train

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
KERNELS = frozenset({"triton-interpreter", "triton-cuda"})
SIZES = {"d_in": 16, "d_sae": 64}


@pytest.fixture(autouse=True)
def pairs_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SAEs of these tests have few latents."""
    monkeypatch.setattr("saelens_sparse.codes.step.MAX_PAIRS_PER_LATENT", 1e9)


def sae_and_rows(subject: Subject, **changes: Any) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {**SIZES, "d_sae": 32} if subject.name == "jumprelu_sparse" else {**SIZES, "k": 2}
    )
    stock = subject.stock(**sizes)
    sparse = subject.sparse(stock, cuda_graph=False, **changes)
    torch.manual_seed(1)
    n_rows = 4 if subject.target.interpreted else 32
    return sparse, [superposed_rows(sparse, n_rows) for _ in range(3)]


@subjects(KERNELS)
def test_trains_the_same_sae(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin that misses nothing, also among so few columns."""
    set_deviations(monkeypatch, 20.0)
    states: list[dict[str, torch.Tensor]] = []
    for screen_dtype in ("auto", "float8"):
        sae, batches = sae_and_rows(subject, screen_dtype=screen_dtype)
        trainer = own_trainer(sae, lr=0.01)
        train(trainer, batches[:2])
        states.append(state_of(trainer))
    for name, value in states[0].items():
        assert (states[1][name] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


@subjects(KERNELS)
def test_the_update_writes_the_rows_of_the_next_screen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saelens_sparse.ops.screen.round_kernels import round_rows

    sae, batches = sae_and_rows(subject, screen_dtype="float8")
    trainer = own_trainer(sae, lr=0.3, lr_warm_up_steps=0)
    for batch in batches[:2]:
        _, (scale_before, _, _) = round_rows(sae.W_enc.T.detach().contiguous(), FLOAT8)
        train(trainer, [batch])
        copy = trainer.optimizer.weights.rounded(sae.W_enc.T)
        assert copy is not None and copy.errors is not None
        assert copy.values.dtype == FLOAT8
        rounded, errors = round_rows(sae.W_enc.T.detach().contiguous(), FLOAT8)
        assert torch.equal(copy.values.float(), rounded.float())
        torch.testing.assert_close(copy.errors, errors, rtol=1e-5, atol=0)
        assert bool((errors[0] != scale_before).any())  # some rows have another scale now
    # The next step takes them, instead of rounding the weights anew.
    rounded_shapes: list[int] = []
    monkeypatch.setattr(
        "saelens_sparse.ops.screen.gpu.round_rows",
        lambda rows, dtype: rounded_shapes.append(rows.shape[0]) or round_rows(rows, dtype),
    )
    train(trainer, batches[2:])
    assert set(rounded_shapes) == {len(batches[2])}


@subjects(KERNELS)
def test_recall_is_reported_at_the_first_step_and_where_steps_are_logged(subject: Subject) -> None:
    sae, batches = sae_and_rows(subject, screen_dtype="float8")
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2)
    trainer = own_trainer(sae, logger=logger)
    reported: list[bool] = []
    for batch in batches:
        metrics: dict[str, Any] = trainer.step(batch).metrics
        reported.append("screen_recall" in metrics)
        if reported[-1]:
            assert 0.9 < metrics["screen_recall"] <= 1
            assert 0 < metrics["screen_whole_rows"] <= 1
        trainer.n_training_steps += 1
    assert reported == [True, True, False]
    sae, batches = sae_and_rows(subject)
    assert "screen_recall" not in own_trainer(sae).step(batches[0]).metrics


@subjects(KERNELS)
def test_recall_is_the_share_that_the_screen_has_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a screen that never sees the latent which is active most."""
    exact, batches = sae_and_rows(subject)
    sae, _ = sae_and_rows(subject, screen_dtype="float8")
    for one in (exact, sae):
        if hasattr(one, "bandwidth"):
            one.bandwidth = 1e-6  # pairs are active latents, none of them near a threshold
    is_active = exact.encode(batches[0]) > 0
    hidden = is_active.sum(0).argmax()

    def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x.float() @ weight.float().T)
        out[:, hidden] = -6e4

    monkeypatch.setattr("saelens_sparse.ops.screen.gpu.multiply_float8", multiply)
    set_deviations(monkeypatch, 20.0)
    metrics: dict[str, Any] = own_trainer(sae).step(batches[0]).metrics
    missed = is_active[:, hidden].sum() / is_active.sum()
    assert metrics["screen_recall"] == pytest.approx(1 - missed.item())
    whole_rows = 1 - is_active[:, hidden].float().mean()
    assert metrics["screen_whole_rows"] == pytest.approx(whole_rows.item())


@subjects(KERNELS)
def test_autocast_does_not_round_what_recall_is_measured_by(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of latents in pairs that bfloat16 cannot tell apart, of which some are active alone."""
    set_deviations(monkeypatch, 20.0)
    k = {} if subject.name == "jumprelu_sparse" else {"k": 1}
    sae, batches = sae_and_rows(subject, screen_dtype="float8", **k)
    with torch.no_grad():
        sae.W_enc[:, 1::2] = sae.W_enc[:, ::2] * (1 + 1e-4)
        sae.W_dec[1::2] = sae.W_dec[::2]
        sae.b_enc.zero_()
    metrics: dict[str, Any] = own_trainer(sae, autocast=True).step(batches[0][:3]).metrics
    assert metrics["screen_recall"] == 1
    assert metrics["screen_whole_rows"] == 1


@subjects(KERNELS)
def test_low_recall_is_warned_of_once(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("saelens_sparse.architectures.screen_recall.MIN_RECALL", 1.1)
    monkeypatch.setattr("saelens_sparse.architectures.base.MEASURED_STEPS", 1)
    sae, batches = sae_and_rows(subject, screen_dtype="float8")
    train(own_trainer(sae), batches[:2])
    said = [str(one.message) for one in recwarn if "float8 screen" in str(one.message)]
    assert len(said) == 1
    assert "training step 0" in said[0]
    assert "screen_dtype='auto'" in said[0]


@subjects(KERNELS)
def test_an_encoding_outside_of_training_misses_nothing(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, batches = sae_and_rows(subject, screen_dtype="float8")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a product in float8")

    monkeypatch.setattr("saelens_sparse.ops.screen.gpu.multiply_float8", never)
    sae.encode(batches[0])


@architectures
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_in": 24}, "d_in must be a multiple of 16 with screen_dtype='float8'; got 24"),
        ({"d_sae": 200}, "d_sae must be a multiple of 16 with screen_dtype='float8'; got 200"),
        ({"dtype": "bfloat16"}, "dtype must be 'float32' with screen_dtype='float8'"),
        ({"implementation": "dense"}, "implementation must be 'auto' or 'triton'"),
        ({"implementation": "torch"}, "implementation must be 'auto' or 'triton'"),
        ({"screen_dtype": "fp8"}, "screen_dtype must be .*auto.*float8.*got 'fp8'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    architecture: Architecture, changes: dict[str, Any], named: str
) -> None:
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 208, "screen_dtype": "float8", **changes}
    needed = architecture.needed_fields(settings["d_sae"])
    with pytest.raises(ValueError, match=named):
        architecture.config(**settings, **needed)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@architectures
@pytest.mark.usefixtures("no_interpreter")
def test_a_cpu_is_refused_before_anything_is_loaded(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = architecture.config
    cfg = config(
        d_in=16, d_sae=208, screen_dtype="float8", device="cpu", **architecture.needed_fields(208)
    )

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", never)
    with pytest.raises(
        ValueError, match=r"screen_dtype='float8' cannot run here: .*8.9 or higher, not 'cpu'"
    ):
        SparseTrainingRunner(runner_config(cfg, tmp_path))
    # An SAE can be made and used: it may be one that was trained elsewhere.
    sae: Any = architecture.sae(cfg)
    sae.encode(torch.randn(3, 16))
    with pytest.raises(ValueError, match="Use 'auto', which runs anywhere"):
        own_trainer(sae).step(torch.randn(4, 16))


@pytest.mark.parametrize(
    ("capability", "hip", "problem"),
    [
        ((9, 0), None, None),
        ((8, 9), None, None),
        (
            (8, 0),
            None,
            "it needs an NVIDIA GPU of compute capability 8.9 or higher; this one has 8.0",
        ),
        ((9, 4), "6.2", "compute capability 8.9 or higher; this is one of AMD's"),
    ],
)
def test_cards_that_do_not_multiply_float8_are_refused(
    capability: tuple[int, int],
    hip: str | None,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(availability, "triton_problem", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    if problem is None:
        availability.require_float8(torch.device("cuda"))
        return
    with pytest.raises(ValueError, match=problem):
        availability.require_float8(torch.device("cuda"))
