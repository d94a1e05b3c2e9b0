"""Training steps as CUDA graphs, and what keeps a step from being one."""

import copy
import itertools
from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.codes.code import PairCode
from saelens_sparse.ops.common.precision import FLOAT8_MULTIPLE, ScreenDtype
from saelens_sparse.training.graphs import (
    STEPS_BEFORE,
    _warn_once,
    can_record,
    is_faster_as_graph,
)
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.conftest import TARGETS
from tests.support.architectures import SUBJECTS, Subject
from tests.support.saes import sparse_like, superposed_rows
from tests.support.trainers import own_trainer, state_of, train

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms]


recorded = pytest.mark.parametrize(
    "architecture",
    [name for name, one in SUBJECTS.items() if one.sparse(one.stock()).graph_key() is not None],
)


def trainer_and_batches(
    n_batches: int,
    *,
    graph: bool = True,
    d_sae: int = 2048,
    architecture: str = "topk_sparse",
    screen_dtype: ScreenDtype = "auto",
    **settings: Any,
) -> tuple[SparseSAETrainer, list[torch.Tensor]]:
    """A trainer of an SAE with latents enough to be screened."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {} if screen_dtype == "auto" else {"d_in": FLOAT8_MULTIPLE}
    stock = Subject(architecture, TARGETS["triton-cuda"]).stock(d_sae=d_sae, **sizes)
    sparse = sparse_like(stock, "triton", screen_dtype=screen_dtype)
    sparse.cfg.cuda_graph = graph
    torch.manual_seed(1)
    batches = [superposed_rows(stock, 64) for _ in range(n_batches)]
    return own_trainer(sparse, dead_feature_window=10_000, **settings), batches


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("buffers", [False, True], ids=["row gradients", "buffers"])
@recorded
def test_is_the_same_training_bit_for_bit(architecture: str, autocast: bool, buffers: bool) -> None:
    states: list[dict[str, torch.Tensor]] = []
    losses: list[list[float]] = []
    for graph in (True, False):
        trainer, batches = trainer_and_batches(
            20, graph=graph, autocast=autocast, architecture=architecture
        )
        trainer.sae.cfg.gradient_buffers = buffers
        losses.append(train(trainer, batches))
        states.append(state_of(trainer))
        assert (trainer._graphs.current is not None) == graph
    assert losses[0] == losses[1]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("buffers", [False, True], ids=["row gradients", "buffers"])
@recorded
def test_moments_in_bfloat16_are_rounded_anew_in_each_replay(
    architecture: str, buffers: bool
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    for graph in (True, False):
        trainer, batches = trainer_and_batches(20, graph=graph, architecture=architecture)
        trainer.sae.cfg.gradient_buffers = buffers
        trainer.sae.cfg.moments = "bfloat16"
        train(trainer, batches)
        states.append(state_of(trainer))
        assert (trainer._graphs.current is not None) == graph
        assert trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"].dtype == torch.bfloat16
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_change_of_moments_gives_up_a_recorded_update() -> None:
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 12)
    for start, moments in ((0, None), (STEPS_BEFORE + 3, "bfloat16"), (STEPS_BEFORE + 8, None)):
        trainer.sae.cfg.moments = moments
        train(trainer, batches[start : start + 5])
        dtype = torch.float32 if moments is None else torch.bfloat16
        assert trainer.optimizer.state[trainer.sae.W_dec]["exp_avg_sq"].dtype == dtype


@recorded
def test_float8_steps_that_measure_recall_are_not_replayed(architecture: str) -> None:
    """And those in between are the same training bit for bit."""
    states: list[dict[str, torch.Tensor]] = []
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=12)
    for graph in (True, False):
        trainer, batches = trainer_and_batches(
            20, graph=graph, architecture=architecture, screen_dtype="float8", logger=logger
        )
        reported: list[bool] = []
        for batch in batches:
            reported.append("screen_recall" in trainer.step(batch).metrics)
            trainer.n_training_steps += 1
        assert [step for step, was in enumerate(reported) if was] == [0, 11]
        states.append(state_of(trainer))
        assert (trainer._graphs.current is not None) == graph
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@recorded
def test_outputs_outlive_the_next_step_or_say_that_they_do_not(architecture: str) -> None:
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 3, architecture=architecture)
    train(trainer, batches[: STEPS_BEFORE + 2])
    assert trainer._graphs.current is not None
    output = trainer.step(batches[0])
    kept = output.loss.item(), output.sae_out.clone(), output.losses["mse_loss"].item()
    metrics = copy.deepcopy(output.metrics)
    l0 = output.feature_acts.bool().float().sum(-1)
    assert (l0 > 0).any()
    late = trainer.step(2 * batches[1])
    assert output.loss.item() == kept[0]
    assert output.losses["mse_loss"].item() == kept[2]
    assert torch.equal(output.sae_out, kept[1])
    assert output.metrics == metrics
    assert late.loss.item() != kept[0]
    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        output.feature_acts.sum()
    with pytest.raises(RuntimeError, match="weights have changed"):
        output.hidden_pre.sum()


@pytest.mark.parametrize(
    ("kind", "loss"), [("auxk", "auxiliary_reconstruction_loss"), ("ghost", "ghost_grad_loss")]
)
def test_dead_latents_take_the_ordinary_step_and_train(kind: str, loss: str) -> None:
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 4)
    trainer.sae.cfg.dead_latent_loss = kind
    train(trainer, batches)
    assert trainer._knows_that_none_is_dead()
    assert trainer._graphs.current is not None
    assert trainer.step(batches[0]).losses[loss].item() == 0
    dead = torch.tensor([1, 5, 9], device="cuda")
    trainer.n_forward_passes_since_fired[dead] = 20_000
    assert not trainer._knows_that_none_is_dead()
    output = trainer.step(batches[0])
    assert output.losses[loss].item() > 0


@recorded
def test_a_latent_that_dies_after_all_were_alive_again_is_seen(architecture: str) -> None:
    """Graphs, then eager steps with a dead latent, then graphs, then a dead latent once more."""
    torch.manual_seed(0)
    d_in, window = 16, 4
    stock = Subject(architecture, TARGETS["triton-cuda"]).stock(d_in=d_in, d_sae=d_in, k=1)
    identity = torch.eye(d_in, device="cuda")
    with torch.no_grad():
        for weight, value in ((stock.W_enc, identity), (stock.W_dec, identity)):
            weight.copy_(value)
        for bias in (stock.b_enc, stock.b_dec):
            bias.zero_()
    # The last latent fires on the last row alone.
    rows = [3 * identity + 0.2 * torch.randn(d_in, d_in, device="cuda") for _ in range(40)]
    batches = [x if index % 20 < 10 else x[:-1] for index, x in enumerate(rows)]
    batches = [x.repeat(2, 1)[:d_in] for x in batches]
    found: list[list[float]] = []
    for graph in (True, False):
        sparse = sparse_like(stock, "triton")
        sparse.cfg.cuda_graph = graph
        trainer = own_trainer(sparse, dead_feature_window=window, lr=1e-6, lr_end=1e-7)
        aux, graphed = [], []
        for batch in batches:
            aux.append(trainer.step(batch).losses["auxiliary_reconstruction_loss"].item())
            graphed.append(
                trainer._graphs.current is not None and trainer._knows_that_none_is_dead()
            )
            trainer.n_training_steps += 1
        assert any(graphed[:10]) == any(graphed[20:30]) == graph
        found.append(aux)
    has_dead = [index % 20 > 10 + window or index == 20 for index in range(len(batches))]
    assert [value > 0 for value in found[0]] == has_dead
    assert found[0] == found[1]


def test_changed_weights_are_seen() -> None:
    """In place, or by a new tensor: the recording, or the copy it multiplies, is made anew."""
    states: list[dict[str, torch.Tensor]] = []
    for graph in (True, False):
        trainer, batches = trainer_and_batches(3 * STEPS_BEFORE + 9, graph=graph)
        third = len(batches) // 3
        train(trainer, batches[:third])
        with torch.no_grad():
            trainer.sae.W_enc.mul_(1.5)
        train(trainer, batches[third : 2 * third])
        trainer.sae.W_dec.data = 1.5 * trainer.sae.W_dec.data
        train(trainer, batches[2 * third :])
        states.append(state_of(trainer))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@recorded
def test_an_uncertain_row_is_trained_on_as_recomputed(architecture: str) -> None:
    states: list[dict[str, torch.Tensor]] = []
    for graph in (True, False):
        trainer, batches = trainer_and_batches(
            STEPS_BEFORE + 4, graph=graph, architecture=architecture
        )
        batches[-1][3] = float("nan")  # has more candidates than there is room for
        train(trainer, batches)
        states.append(state_of(trainer))
    for name, value in states[0].items():
        assert torch.equal(value.isnan(), states[1][name].isnan()), name


def test_whoever_hooks_in_is_called() -> None:
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 4)
    train(trainer, batches[:-1])
    sae: Any = trainer.sae
    assert is_faster_as_graph(sae)
    assert can_record(sae, batches[0])
    calls: list[int] = []
    sae.hook_sae_input.add_hook(lambda value, hook: calls.append(1))  # noqa: ARG005
    assert not can_record(sae, batches[0])
    train(trainer, batches[-1:])
    assert calls == [1]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *itertools.product(
            ("training_forward_pass", "calculate_aux_loss", "encode_with_hidden_pre", "decode"),
            ("instance", "subclass"),
        ),
        ("training_forward_pass", "class"),
        ("mse_loss_fn", "instance"),
        ("run_time_activation_norm_fn_in", "instance"),
    ],
)
def test_whoever_overrides_a_part_is_called_in_each_step(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 8)
    sae: Any = trainer.sae
    calls: list[int] = []
    original = getattr(sae if way == "instance" else type(sae), name)

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*args, **options)

    train(trainer, batches[: STEPS_BEFORE + 2])
    assert trainer._graphs.current is not None
    if way == "instance":
        setattr(sae, name, counting)
    elif way == "class":
        monkeypatch.setattr(type(sae), name, counting)
    else:
        sae.__class__ = type("Mine", (type(sae),), {name: counting})
    train(trainer, batches[STEPS_BEFORE + 2 :])
    assert len(calls) == 6


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("window", [10_000, 2], ids=["all alive", "dead latents"])
@recorded
def test_a_steady_step_never_waits_for_the_device(
    architecture: str, graph: bool, window: int
) -> None:
    trainer, batches = trainer_and_batches(
        STEPS_BEFORE + 12, graph=graph, architecture=architecture
    )
    trainer.cfg.dead_feature_window = window
    for batch in batches[: STEPS_BEFORE + 6]:
        trainer.step(batch)
        trainer.n_training_steps += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[STEPS_BEFORE + 6 :]:
            trainer.step(batch)
            trainer.n_training_steps += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["count", "update"])
def test_a_rest_that_cannot_be_recorded_is_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = getattr(
        SparseSAETrainer, {"count": "_count_firings", "update": "_update"}[name]
    )

    def synchronizing(self: SparseSAETrainer, *args: Any) -> Any:
        result = original(self, *args)
        self.sae.b_dec.sum().item()
        return result

    monkeypatch.setattr(SparseSAETrainer, original.__name__, synchronizing)
    _warn_once.cache_clear()
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 5)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        train(trainer, batches)
    monkeypatch.undo()
    assert trainer._graphs.current is not None
    reference, _ = trainer_and_batches(0, graph=False)
    train(reference, batches)
    for part, value in state_of(trainer).items():
        assert torch.equal(value, state_of(reference)[part]), part


def test_what_a_step_depends_on_may_change() -> None:
    """Learning rate, statistics that are reset, optimizer state that is loaded, hooks."""
    states: list[dict[str, torch.Tensor]] = []
    for graph in (True, False):
        trainer, batches = trainer_and_batches(STEPS_BEFORE + 16, graph=graph)
        train(trainer, batches[: STEPS_BEFORE + 4])
        trainer._reset_running_sparsity_stats()
        train(trainer, batches[STEPS_BEFORE + 4 : STEPS_BEFORE + 8])
        trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 0.5
        train(trainer, batches[STEPS_BEFORE + 8 : STEPS_BEFORE + 12])
        calls: list[int] = []
        trainer.optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(trainer, batches[STEPS_BEFORE + 12 :])
        assert calls == [1] * 4
        states.append(state_of(trainer))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    ("owner", "name"),
    [(SparseTrainingSAEMixin, "prepare_weights"), (PairCode, "latent_counts")],
    ids=["forward", "backward"],
)
def test_a_failed_recording_costs_nothing_but_the_graph(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(owner, name)

    def synchronizing(self: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            torch.ones((), device="cuda").item()
        return original(self)

    monkeypatch.setattr(owner, name, synchronizing)
    _warn_once.cache_clear()
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 5)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        train(trainer, batches)
    assert trainer._graphs.current is None
    assert torch.randn(3, device="cuda").isfinite().all()
    reference, _ = trainer_and_batches(0, graph=False)
    train(reference, batches)
    for name, value in state_of(trainer).items():
        assert torch.equal(value, state_of(reference)[name]), name


def test_records_while_an_earlier_output_is_alive() -> None:
    """SAELens's trainer keeps a step's output, and with it nodes of its graph, during the next."""
    trainer, batches = trainer_and_batches(STEPS_BEFORE + 3)
    output = None
    for batch in batches:
        output = trainer.step(batch)
    assert output is not None
    assert trainer._graphs.current is not None
