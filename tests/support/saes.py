"""Pairs of a stock and a sparse SAE with the same weights, and what a step on them gives."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from saelens_sparse.architectures import ARCHITECTURES
from saelens_sparse.codes.on_demand import OnDemandTensor
from tests.conftest import TARGETS, Target, marks, target_parameters

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Precision:
    """Dtype of the parameters, and whether the step runs under bfloat16 autocast."""

    name: str
    dtype: torch.dtype
    autocast: bool = False

    @property
    def eps(self) -> float:
        return torch.finfo(torch.bfloat16 if self.autocast else self.dtype).eps


FLOAT32 = Precision("float32", torch.float32)
FLOAT64 = Precision("float64", torch.float64)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)
AUTOCAST = Precision("autocast", torch.float32, autocast=True)
PRECISIONS = (FLOAT32, FLOAT64, BFLOAT16, AUTOCAST)

# Of 64 latents.
N_DEAD = {"no-dead": 0, "few-dead": 3, "many-dead": 20, "all-dead": 64}

input_or_not = pytest.mark.parametrize(
    "input_gradient", [False, True], ids=["constant-input", "input-gradient"]
)
not_interpreted = pytest.mark.parametrize("target", target_parameters(interpreted=False))


def runs(target: Target, precision: Precision) -> bool:
    return precision.dtype in target.dtypes and not (precision.autocast and target.interpreted)


def target_precision_parameters(
    *precisions: Precision, targets: Mapping[str, Target] = TARGETS
) -> list[Any]:
    """Every implementation that runs here, in each of the precisions that it takes."""
    return [
        pytest.param(target, precision, id=f"{name}-{precision.name}", marks=marks(target))
        for name, target in targets.items()
        for precision in precisions
        if target.runs_here and runs(target, precision)
    ]


def randomize(sae: TrainingSAE[Any]) -> None:
    """Give every parameter values without the symmetries of SAELens's initialisation."""
    d_sae, d_in = sae.cfg.d_sae, sae.cfg.d_in
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=-1)
    norms = 0.5 + 1.5 * torch.rand(d_sae, 1)
    noise = torch.randn(d_sae, d_in) / d_in**0.5
    values = {
        "W_dec": directions * norms,
        "W_enc": ((directions + 0.5 * noise) / norms).T,
        "b_enc": 0.1 * torch.randn(d_sae),
        "b_dec": 0.3 * torch.randn(d_in),
    }
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(value)


def make_stock(
    *, dtype: torch.dtype = torch.float32, device: str = "cpu", **cfg: Any
) -> TopKTrainingSAE:
    """A stock SAE with random weights from the global generator."""
    cfg = {"d_in": 12, "d_sae": 48, "k": 5, **cfg}
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(**cfg, dtype=str(dtype).removeprefix("torch."), device=device)
    )
    randomize(sae)
    return sae


def sparse_like(stock: TrainingSAE[Any], implementation: str = "torch", **changes: Any) -> Any:
    """A sparse SAE with the configuration and the weights of `stock`.

    Args:
        stock: the SAE to copy.
        implementation: as in the configuration, or "fused" for an `auto` that begins with the
            fused dense products.
        changes: other fields of the configuration.
    """
    name = stock.cfg.architecture()
    (architecture,) = (one for one in ARCHITECTURES.values() if one.stock == name)
    fused = implementation == "fused"
    cfg = {
        **stock.cfg.to_dict(),
        "architecture": architecture.name,
        "implementation": "auto" if fused else implementation,
        **changes,
    }
    sparse: Any = architecture.sae(architecture.config.from_dict(cfg))
    sparse.load_state_dict(stock.state_dict())
    if fused:
        assert sparse.implementation.name == "fused", sparse.implementation.reason
    return sparse


def stock_like(sae: TrainingSAE[Any], dtype: torch.dtype = torch.float64) -> Any:
    """A stock SAE in another dtype with the values of the weights of `sae`."""
    name = sae.cfg.architecture()
    name = ARCHITECTURES[name].stock if name in ARCHITECTURES else name
    stock_class, config_class = get_sae_training_class(name)
    cfg = {
        **sae.cfg.to_dict(),
        "architecture": name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    stock = stock_class(config_class.from_dict(cfg))
    stock.load_state_dict(sae.state_dict())
    return stock


def zipf_inputs(
    sae: TopKTrainingSAE,
    n_rows: int,
    dead: torch.Tensor | None = None,
    *,
    n_selected: int | None = None,
) -> torch.Tensor:
    """Superposed rows, such that every precision selects the same latents.

    Every row's top `n_selected` (the SAE's k if None), and its top dead latents if there are any,
    are decided by more than bfloat16's rounding.
    """
    d_sae, d_in = sae.cfg.d_sae, sae.cfg.d_in
    n_selected = sae.cfg.k if n_selected is None else n_selected
    oracle = stock_like(sae)
    rows: list[torch.Tensor] = []
    for _ in range(100):
        x = superposed_rows(sae, 4 * n_rows)
        with torch.no_grad():
            hidden_pre = oracle.encode_with_hidden_pre(x.double())[1]
        decided = _is_decided(hidden_pre, n_selected)
        if dead is not None:
            decided &= _is_decided(hidden_pre[:, dead], d_in // 2)
        rows += x[decided]
        if len(rows) >= n_rows:
            return torch.stack(rows[:n_rows])
    raise ValueError(f"hardly any row decides which {n_selected} of {d_sae} latents it selects")


def rows_for_batch_topk(
    sae: TrainingSAE[Any], n_rows: int, *dead: torch.Tensor | None
) -> torch.Tensor:
    """Superposed rows, such that every precision selects the same latents of the batch.

    No score is nearer to the batch's limit than bfloat16's rounding, and as many exceed it as a
    BatchTopK with the SAE's k keeps. Rows' top dead latents of each mask are decided too.
    """
    oracle = stock_like(sae)
    x = superposed_rows(sae, 60 * max(n_rows, 8))
    with torch.no_grad():
        scores = oracle.encode_with_hidden_pre(x.double())[1]
    limit = scores.flatten().topk(int(sae.cfg.k * len(x))).values[-1]
    assert limit > 0
    decided = ((scores - limit).abs() > 0.01 * scores.abs().amax(1, keepdim=True)).all(1)
    for mask in dead:
        if mask is not None:
            decided &= _is_decided(scores[:, mask], sae.cfg.d_in // 2)
    x, counts = x[decided], (scores[decided] > limit).sum(1)
    wanted = int(sae.cfg.k * n_rows)
    for _ in range(n_rows + 1):
        # The row whose replacement brings the number of active latents nearest to what is wanted.
        excess = counts[:n_rows].sum() - wanted
        if excess == 0:
            return x[:n_rows]
        left = (excess - (counts[:n_rows, None] - counts[n_rows:])).abs()
        place, other = divmod(int(left.argmin()), left.shape[1])
        order = torch.arange(len(x), device=x.device)
        order[place], order[n_rows + other] = n_rows + other, place
        x, counts = x[order], counts[order]
    raise ValueError(f"no {n_rows} rows have {wanted} active latents that every precision selects")


def superposed_rows(sae: TrainingSAE[Any], n_rows: int) -> torch.Tensor:
    """Rows of superposed decoder directions, present with Zipf-distributed frequencies.

    A few latents fire on almost every row and most on hardly any; strengths are log-normal.
    Values are exact in bfloat16.
    """
    d_sae, d_in = sae.cfg.d_sae, sae.cfg.d_in
    presence = (4.0 / torch.arange(1, d_sae + 1)).clamp(max=0.95)
    directions = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=-1)
    present = torch.rand(n_rows, d_sae) < presence
    strengths = present * torch.randn(n_rows, d_sae).exp()
    x = strengths @ directions + 0.1 * torch.randn(n_rows, d_in)
    return x.to(torch.bfloat16).to(sae.device, sae.dtype)


def _is_decided(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Rows whose k-th score and the next differ by more than low precision blurs them."""
    if k >= scores.shape[1]:
        return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    top = scores.topk(k + 1).values
    return top[:, -2] - top[:, -1] > 0.02 * top.abs().amax(-1)


def dead_mask(sae: TrainingSAE[Any], n_dead: int) -> torch.Tensor:
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[torch.randperm(sae.cfg.d_sae)[:n_dead]] = True
    return mask.to(sae.device)


def coefficients(sae: TrainingSAE[Any]) -> dict[str, float]:
    """What the trainer gives `training_forward_pass` once every coefficient is warmed up."""
    return {
        name: value.value if isinstance(value, TrainCoefficientConfig) else value
        for name, value in sae.get_coefficients().items()
    }


def forward_pass(
    sae: TrainingSAE[Any],
    x: torch.Tensor,
    dead: torch.Tensor | None = None,
    *,
    autocast: bool = False,
) -> TrainStepOutput:
    """`training_forward_pass` as SAELens's trainer calls it."""
    with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
        return sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients=coefficients(sae),
                dead_neuron_mask=dead,
                n_training_steps=0,
                is_logging_step=False,
            )
        )


def on_cpu(values: Mapping[str, torch.Tensor]) -> Values:
    return {name: value.detach().double().cpu() for name, value in values.items()}


def gradients(sae: torch.nn.Module) -> Values:
    return {
        f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in sae.named_parameters()
    }


def step_values(
    sae: TrainingSAE[Any],
    x: torch.Tensor,
    dead: torch.Tensor | None = None,
    *,
    autocast: bool = False,
    input_gradient: bool = False,
    objective: Callable[[TrainStepOutput], torch.Tensor] = lambda output: output.loss,
) -> Values:
    """All that one forward and backward pass computes, in float64 on the CPU.

    Activations are sorted by row, because ties are broken arbitrarily.
    """
    x = x.to(sae.dtype).detach().clone().requires_grad_(input_gradient)
    sae.zero_grad()
    output = forward_pass(sae, x, dead, autocast=autocast)
    objective(output).backward()
    values = {"loss": output.loss, **output.losses, "sae_out": output.sae_out}
    values["sorted feature_acts"] = output.feature_acts.sort(dim=-1).values
    if input_gradient:
        assert x.grad is not None
        values["gradient of input"] = x.grad
    return on_cpu({**values, **gradients(sae)})


def random_objective(*names: str) -> Callable[[TrainStepOutput], torch.Tensor]:
    """A loss that reads tensors of the step's output with fixed random weights."""

    def objective(output: TrainStepOutput) -> torch.Tensor:
        total = torch.zeros((), dtype=output.sae_out.dtype, device=output.sae_out.device)
        for name in names:
            value = getattr(output, name)
            generator = torch.Generator().manual_seed(len(name))
            weights = torch.randn(value.shape, generator=generator).bfloat16()
            total = total + (value * weights.to(value)).sum()
        return total

    return objective


def error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    return (value - oracle).norm().item()


def require_same_gradients(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    values = gradients(actual)
    for name, value in gradients(expected).items():
        assert error(values[name], value) <= 1e-5 * value.norm(), name


def parameters(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return on_cpu(dict(sae.named_parameters()))


def assert_same_training(
    actual: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 1e-4
) -> None:
    """Parameters agree up to the rounding that some steps of Adam have grown."""
    expected_parameters = parameters(expected)
    for name, value in parameters(actual).items():
        distance = (value - expected_parameters[name]).norm()
        assert distance <= tolerance * expected_parameters[name].norm() + 1e-9, name


def require_within_budget(
    sparse: Values,
    stock: Values,
    oracle: Values,
    eps: float,
    factor: float = 2.0,
    floors: Mapping[str, float] | None = None,
) -> None:
    """Each quantity is at most `factor` times as far from the oracle as stock is.

    The floor, four units in the last place of the quantity's norm unless `floors` names another,
    covers scalars whose rounding errors happen to cancel in stock.
    """
    floors = floors or {}
    assert sparse.keys() == stock.keys() == oracle.keys()
    for name, expected in oracle.items():
        floor = floors.get(name, 4 * eps) * expected.norm().item()
        allowed = factor * error(stock[name], expected) + floor
        actual = error(sparse[name], expected)
        assert actual <= allowed, f"{name}: error {actual:.3e}, allowed {allowed:.3e}"


def shrunk_to_float64(float32: Values, oracle: Values) -> Values:
    """Values whose errors are those of `float32` in proportion to the unit of rounding."""
    shrink = FLOAT64.eps / FLOAT32.eps
    return {name: oracle[name] + shrink * (value - oracle[name]) for name, value in float32.items()}


def compare_steps(
    stock: TrainingSAE[Any],
    sparse: TrainingSAE[Any],
    x: torch.Tensor,
    dead: torch.Tensor | None,
    precision: Precision,
    **options: Any,
) -> None:
    """One step of both, held against stock in float64."""
    # In float64 there is no better reference than stock itself. Its error, and the reference's,
    # is that of stock in float32 in proportion to the unit of rounding.
    narrow = precision == FLOAT64
    yardstick = stock_like(stock, torch.float32) if narrow else stock
    oracle = step_values(stock_like(stock), x, dead, **options)
    options["autocast"] = precision.autocast
    stock_values = step_values(yardstick, x, dead, **options)
    if narrow:
        stock_values = shrunk_to_float64(stock_values, oracle)
    sparse_values = step_values(sparse, x, dead, **options)
    # What stock keeps in float32 is rounded to it in every arm.
    floors = {
        f"gradient of {name}": FLOAT32.eps
        for name, parameter in sparse.named_parameters()
        if narrow and parameter.dtype == torch.float32
    }
    factor = 3.0 if narrow else 2.0
    require_within_budget(sparse_values, stock_values, oracle, precision.eps, factor, floors)


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor holds that any operation returns."""

    numel = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                is_dense = leaf.layout == torch.strided
                self.numel = max(self.numel, leaf.numel() if is_dense else leaf._nnz())
        return out


def record_materializations(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Collects the class of every on-demand tensor that is computed from now on."""
    computed: list[type] = []
    original = OnDemandTensor.materialized

    def recording(self: OnDemandTensor) -> torch.Tensor:
        computed.append(type(self))
        return original(self)

    monkeypatch.setattr(OnDemandTensor, "materialized", recording)
    return computed
