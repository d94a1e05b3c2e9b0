"""SAELens's Adam on the parameters of a sparse SAE: fused, and in the weights' own layout.

The trainer builds a plain `torch.optim.Adam`. Before each step PyTorch calls a hook common to
all optimizers; for parameter groups of sparse SAEs it

- asks for PyTorch's fused Adam where nobody has chosen otherwise: the same update in one pass
  instead of ten, and without a temporary of the size of all parameters;
- gives gradients and moments the strides of their weight (a stock checkpoint brings its own).

What `state_dict()` returns stays what stock writes: stock's options, contiguous moments.

`ClippingAdam` is that Adam with the clipping that SAELens's trainer does before it. It alone can
hold moments in bfloat16. For parameters that are to have them, the hook refuses all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.autograd.graph import increment_version
from torch.optim import Adam, Optimizer
from torch.optim.adam import adam
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import override

from saelens_sparse.architectures.parameters import FUSED_ADAM, moments_salt
from saelens_sparse.choice.availability import triton_problem
from saelens_sparse.ops.common.ranges import profiler_range
from saelens_sparse.ops.update.adam import adam_update_by_blocks
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.weight_cache import WeightCache, WeightView
from saelens_sparse.private_names import OPTIMIZER_HOOKS
from saelens_sparse.training.moments import (
    MOMENTS,
    convert_moments,
    moments_dtype,
    require_own_update,
    set_moments_apart,
)

if TYPE_CHECKING:
    from saelens_sparse.ops.update.row_gradient_kernels import RowGradientSums

_SWITCHED = "saelens_sparse_fused"  # key of groups that were fused here; never saved
_followed: WeakSet[Optimizer] = WeakSet()


@cache
def prepare_optimizers() -> None:
    """Register the hook that prepares optimizers before a step; once per process."""
    register_optimizer_step_pre_hook(_prepare)


def _prepare(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        parameters: list[torch.nn.Parameter] = group["params"]
        if not any(hasattr(parameter, FUSED_ADAM) for parameter in parameters):
            continue
        if any(moments_salt(parameter) is not None for parameter in parameters):
            require_own_update(optimizer, group, type(optimizer) is ClippingAdam)
        if optimizer not in _followed:
            optimizer.register_state_dict_post_hook(_write_as_stock)
            optimizer.register_step_post_hook(_count_changes)
            _followed.add(optimizer)
        _choose_fused(optimizer, group)
        for parameter in parameters:
            _align(parameter, optimizer.state.get(parameter, {}), fused=bool(group.get("fused")))


def _choose_fused(optimizer: Optimizer, group: dict[str, Any]) -> None:
    wanted = type(optimizer) in (Adam, ClippingAdam) and all(
        getattr(parameter, FUSED_ADAM, False) for parameter in group["params"]
    )
    if group.get(_SWITCHED) and not wanted:
        group["fused"] = None
        del group[_SWITCHED]
    elif wanted and not (
        group["fused"] is not None
        or group["foreach"] is not None
        or group["capturable"]
        or group["differentiable"]
    ):
        group["fused"] = group[_SWITCHED] = True


def _align(parameter: torch.nn.Parameter, state: dict[str, Any], *, fused: bool) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    for name, value in state.items():
        if type(value) is not torch.Tensor:  # quantized states are of a class of their own
            continue
        if value.shape == parameter.shape and value.stride() != parameter.stride():
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif name == "step" and fused and value.device != parameter.device:
            state[name] = value.to(parameter.device)


def _count_changes(optimizer: Optimizer, *_: Any) -> None:
    """Fused kernels change parameters without telling autograd, which others rely on."""
    if isinstance(optimizer, ClippingAdam):
        return  # it tells by itself
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


def _write_as_stock(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:  # noqa: ARG001
    for group in state_dict["param_groups"]:
        if group.pop(_SWITCHED, False):
            group["fused"] = None
    state_dict["state"] = {
        index: {
            name: value.contiguous() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        for index, state in state_dict["state"].items()
    }


class ClippingAdam(Adam):
    """
    `torch.nn.utils.clip_grad_norm_` and Adam in one pass over parameters, gradients and moments.

    Same update as one after the other up to rounding, same state. Kernels leave gradients as they
    are and update by scaled ones; elsewhere they are clipped in place, as `clip_grad_norm_` does.

    Args:
        params: as for `torch.optim.Adam`, as all other arguments; `closure` is not supported.
        max_norm: the norm of all gradients together is clipped to this.

    Attributes:
        weights: what the last update has written besides the parameters.
    """

    def __init__(self, params: Any, *, max_norm: float, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.max_norm = max_norm
        self.weights = WeightCache()
        self._learning_rates: dict[tuple[int, torch.device], tuple[float, torch.Tensor]] = {}

    @override
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        row_gradients: Mapping[torch.nn.Parameter, Sequence[RowGradient]] = MappingProxyType({}),
        views: Mapping[torch.nn.Parameter, tuple[WeightView, torch.dtype]] = MappingProxyType({}),
    ) -> None:
        """
        Clip all gradients together, and update.

        Args:
            closure: None.
            row_gradients: gradients that no parameter holds; added to those that are held.
            views: what to write besides a parameter, wherever its gradient is a row gradient; and
                the dtype of copied rows.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("closure must be None: gradients are clipped once a step")
        taken = self._take(row_gradients)
        self.weights = self.weights.make_room(
            (taken[parameter].rows_of(parameter), *view)
            for parameter, view in views.items()
            if parameter in taken
        )
        if self._update(taken):
            for group in self.param_groups:
                if group.get("fused"):
                    increment_version(group["params"])
            for copy in self.weights.copies:
                copy.is_written()

    def _update(self, row_gradients: Mapping[torch.nn.Parameter, RowGradient]) -> bool:
        """Clip and update; returns whether there was a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients and not row_gradients:
            return False
        with profiler_range("saelens_sparse::clip"):
            sums = {p: _start_sums(gradient) for p, gradient in row_gradients.items()}
            norms = [torch.nn.utils.get_total_norm(gradients)] if gradients else []
            norms += [part.square_sum().sqrt() for part in sums.values()]
            norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if not self._divides_gradients():
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
            super().step()
            return True
        # As clip_grad_norm_: gradients / divisor = gradients * min(1, max_norm / (norm + 1e-6)).
        divisor = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)
        has_salt = any(moments_salt(parameter) is not None for parameter in parameters)
        if sums or (self._is_plain() and all(_runs_kernels(part) for part in gradients)):
            self._step_by_kernel(divisor, row_gradients, sums)
        elif has_salt or (divisor.device.type == "cpu" and self._is_plain()):
            self._step_by_parameter(divisor)
        else:
            self.grad_scale = divisor.float()  # what PyTorch's fused Adam divides gradients by
            try:
                super().step()
            finally:
                del self.grad_scale
        return True

    def count_replay(self) -> None:
        """Say that the replay of a CUDA graph has done what a step did when it was recorded."""
        for group in self.param_groups:
            increment_version(group["params"])
        for copy in self.weights.copies:
            copy.is_written()

    @property
    def has_hooks_of_others(self) -> bool:
        """Whether somebody wants to be called at each step; this module's own hook is one."""
        before, after = (getattr(self, hooks) for hooks in OPTIMIZER_HOOKS)
        return bool(before) or len(after) > 1

    def send_learning_rates(self) -> list[torch.Tensor]:
        """Let the device know of changed learning rates; returns where a replay reads them."""
        return [
            self._learning_rate(group, group["params"][0].device) for group in self.param_groups
        ]

    def _learning_rate(self, group: dict[str, Any], device: torch.device) -> torch.Tensor:
        """The learning rate of a group on the device, one element."""
        value = float(group["lr"])
        key = (id(group), device)
        if key not in self._learning_rates:
            self._learning_rates[key] = (value, torch.tensor(value, device=device))
        sent, on_device = self._learning_rates[key]
        if sent != value:
            on_device.fill_(value)
            self._learning_rates[key] = (value, on_device)
        return on_device

    def _take(
        self, given: Mapping[torch.nn.Parameter, Sequence[RowGradient]]
    ) -> dict[torch.nn.Parameter, RowGradient]:
        """The row gradients that the update can take; others become gradients that are held."""
        plain = self._is_plain() and self._divides_gradients()
        taken: dict[torch.nn.Parameter, RowGradient] = {}
        for parameter, parts in given.items():
            if plain and parameter.grad is None and len(parts) == 1:
                taken[parameter] = parts[0]
                continue
            for part in parts:
                dense, _ = part.dense(parameter.dtype, "triton")
                parameter.grad = dense if parameter.grad is None else parameter.grad + dense
        return taken

    def _divides_gradients(self) -> bool:
        """Whether the update scales gradients itself: fused ones do, by a float32."""
        return all(
            group.get(_SWITCHED) and all(p.dtype != torch.float64 for p in group["params"])
            for group in self.param_groups
        )

    def _is_plain(self) -> bool:
        """Whether the update is no more than what this package's kernels compute."""
        return not any(
            group["weight_decay"] or group["amsgrad"] or group["maximize"]
            for group in self.param_groups
        )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of `Adam`. Moments that are to be in bfloat16 go there from whatever dtype they have.

        PyTorch converts all to the dtype of their parameter.
        """
        rest, apart = set_moments_apart(state_dict, self.param_groups)
        super().load_state_dict(rest)
        for parameter, moments in apart.items():
            self.state[parameter].update(moments)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weights, self._learning_rates = WeightCache(), {}

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Step and moments, as `Adam` would make them but for the dtype of those in bfloat16."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=moments_dtype(parameter))
        convert_moments(parameter, state)
        return state

    def _step_by_parameter(self, divisor: torch.Tensor) -> None:
        """PyTorch's fused Adam on contiguous rows: of a gradient that is not, it makes a copy.

        Where moments are in bfloat16, an update of the same formula block by block.
        """
        # It takes longer if it divides.
        grad_scale = None if divisor == 1 else divisor.float()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                weight, gradient, first, second = _rows_in_memory(
                    parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                )
                salt = moments_salt(parameter)
                if salt is not None:
                    state["step"] += 1
                    adam_update_by_blocks(
                        weight, gradient, first, second, state["step"], divisor,
                        lr=float(group["lr"]), betas=(beta1, beta2), eps=group["eps"], salt=salt,
                    )  # fmt: skip
                    continue
                adam(
                    [weight], [gradient], [first], [second], [], [state["step"]],
                    fused=True, grad_scale=grad_scale, lr=group["lr"], beta1=beta1, beta2=beta2,
                    eps=group["eps"], weight_decay=0, amsgrad=False, maximize=False,
                )  # fmt: skip

    def _step_by_kernel(
        self,
        divisor: torch.Tensor,
        row_gradients: Mapping[torch.nn.Parameter, RowGradient],
        sums: Mapping[torch.nn.Parameter, RowGradientSums],
    ) -> None:
        from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_update

        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None and parameter not in sums:
                    continue
                lr = self._learning_rate(group, parameter.device)
                salt = moments_salt(parameter)
                settings = AdamSettings(lr, beta1, beta2, group["eps"], salt)
                state = self._state_of(parameter)
                state["step"] += 1
                moments = state["exp_avg"], state["exp_avg_sq"]
                if parameter in sums:
                    rows_of = row_gradients[parameter].rows_of
                    copy = self.weights.of(rows_of(parameter))
                    sums[parameter].update(
                        rows_of(parameter), rows_of(moments[0]), rows_of(moments[1]),
                        state["step"], divisor, settings, copy,
                    )  # fmt: skip
                elif parameter.grad is not None:
                    weight, gradient, first, second = _rows_in_memory(
                        parameter, parameter.grad, *moments
                    )
                    adam_update(weight, gradient, first, second, state["step"], divisor, settings)


def _rows_in_memory(weight: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A weight and tensors with its strides, transposed if that makes them contiguous."""
    tensors = (weight, *others)
    return tensors if weight.is_contiguous() else tuple(tensor.T for tensor in tensors)


def _runs_kernels(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and triton_problem(tensor.device, tensor.dtype) is None


def _start_sums(gradient: RowGradient) -> RowGradientSums:
    from saelens_sparse.ops.update.row_gradient_kernels import RowGradientSums

    return RowGradientSums(gradient)
