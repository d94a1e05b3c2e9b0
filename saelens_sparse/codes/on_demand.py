"""Tensors of a step that are computed only if somebody looks at them.

SAELens's trainer asks little of `feature_acts` (which latents fired, how often) and nothing of
`hidden_pre`. Both are stood in for by tensor subclasses that answer those questions from the
selected latents. Every other operation sees an ordinary tensor, built on demand with its graph.
What a decode has already read does not depend on an ordinary tensor that is made after it. Whoever
asks for the gradient of such a tensor gets an error, not one that lacks what the decode adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from sae_lens.saes.sae import mse_loss
from torch.utils._pytree import tree_map
from typing_extensions import override

from saelens_sparse.codes.code import Code
from saelens_sparse.codes.compressed import compressed
from saelens_sparse.codes.step import step_in_progress
from saelens_sparse.ops.common.versions import version_of
from saelens_sparse.ops.decode import Comparison


def _getter(name: str) -> Callable[..., Any]:
    """What `__torch_function__` gets as `func` when a tensor's attribute is read."""
    return getattr(torch.Tensor, name).__get__


_REQUIRES_GRAD = _getter("requires_grad")
_DESCRIBES_ONLY = {
    _getter(name)
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_meta")
} | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.Tensor.__len__,
}
_WATCHES_GRADIENT = {
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.retain_grad,
    _getter("grad"),
}
_COPIES = {torch.Tensor.__reduce_ex__, torch.Tensor.__deepcopy__}


class OnDemandTensor(torch.Tensor):
    """A tensor whose shape and dtype are known and whose values are computed when used.

    Operations that a subclass does not answer itself get the tensor that `compute` returns,
    made once and kept, so that a change or a gradient of it is seen by all later uses.
    """

    _made: torch.Tensor | None
    _with_graph: bool

    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> Self:
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        if requires_grad:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                self.register_hook(_refuse_gradient)
        self._made = None
        self._with_graph = torch.is_grad_enabled()
        return self

    def compute(self) -> torch.Tensor:
        """The ordinary tensor, with its autograd graph."""
        raise NotImplementedError

    def answer(
        self,
        func: Callable[..., Any],  # noqa: ARG002
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
    ) -> Any:
        """The result of `func` without the ordinary tensor, or `NotImplemented`."""
        return NotImplemented

    def require_dense_gradient(self) -> None:
        """Raise if the graph that a loss was made with passes this tensor by."""

    def materialized(self) -> torch.Tensor:
        """The ordinary tensor, made when first asked for; all later uses share it."""
        if self._made is None:
            # A first look under no_grad must not cost later ones the graph.
            with torch.set_grad_enabled(self._with_graph):
                self._made = self.compute()
        return self._made

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has the ordinary tensor, so that it cannot matter to anybody."""
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            return self._made is None

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            if func in _DESCRIBES_ONLY:
                return func(*args, **kwargs)
            for tensor in _asked_for_gradients(func, args):
                tensor.require_dense_gradient()
            if args and isinstance(args[0], OnDemandTensor) and args[0].is_untouched:
                result = args[0].answer(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        return func(*materialize(args), **materialize(kwargs))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Reached only by callers that bypass __torch_function__.
        return func(*materialize(args), **materialize(kwargs or {}))


def materialize(tree: Any) -> Any:
    """A tensor, or a structure of them, with those that are made on demand made."""
    return tree_map(lambda x: x.materialized() if isinstance(x, OnDemandTensor) else x, tree)


def _refuse_gradient(_: torch.Tensor) -> None:
    """Reached through a graph that took the tensor itself and not the ordinary one."""
    raise RuntimeError(
        "a custom autograd.Function was given feature_acts, hidden_pre or squared errors of a "
        "sparse SAE, whose weights its gradient does not reach. Give it a clone(), or set "
        "implementation='dense'."
    )


def _asked_for_gradients(func: Callable[..., Any], args: tuple[Any, ...]) -> list[OnDemandTensor]:
    """The tensors whose gradients a call of `func` is about."""
    if func in _WATCHES_GRADIENT:
        asked_for = args[:1]
    elif func is torch.autograd.grad:
        asked_for = args[1]  # PyTorch passes outputs and inputs as tuples
    else:
        return []
    return [tensor for tensor in asked_for if isinstance(tensor, OnDemandTensor)]


def _no_dense_gradient(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} of a sparse SAE has no gradient here: a sparse decode has read the active latents "
        "alone. Set implementation='dense', or encode, look at feature_acts, and only then decode."
    )


class SparseFeatureActs(OnDemandTensor):
    """`feature_acts` of a training step: the activations of a code."""

    code: Code

    @override
    def __new__(cls, code: Code, leading_shape: Sequence[int]) -> Self:
        shape = (*leading_shape, code.d_sae)
        self = OnDemandTensor.__new__(
            cls, shape, code.reported_dtype, code.acts.device, code.acts.requires_grad
        )
        self.code = code
        return self

    @override
    def compute(self) -> torch.Tensor:
        self.code.require_current()
        return self.code.dense_acts().view(self.size())

    @override
    def require_dense_gradient(self) -> None:
        if self.code.is_decoded and self.code.acts.requires_grad:
            raise _no_dense_gradient("feature_acts")

    @override
    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func == _REQUIRES_GRAD:
            return self.code.acts.requires_grad
        if func is torch.Tensor.bool and len(args) == 1 and not kwargs:
            self.code.require_current()
            return FiringPattern(self.code, self.size(), torch.bool)
        layout = _layout_asked_for(func, args, kwargs)
        has_rows = layout == torch.sparse_csr and self.dim() >= 2
        if layout is not None and (has_rows or layout == torch.sparse_coo):
            self.code.require_current()
            return compressed(self.code, self.size(), layout)
        return NotImplemented


def _layout_asked_for(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.layout | None:
    """Into which layout a call brings a tensor; None if it does other things, or more."""
    if func is torch.Tensor.to_sparse_csr and len(args) == 1 and not kwargs:
        return torch.sparse_csr
    # What `to_sparse_coo` calls too.
    if func is torch.Tensor.to_sparse and len(args) == 1 and kwargs.keys() <= {"layout"}:
        return kwargs.get("layout") or torch.sparse_coo
    return None


def code_of(tensor: torch.Tensor) -> Code | None:
    """The code that a tensor stands for, if it stands for one."""
    return tensor.code if isinstance(tensor, SparseFeatureActs | DeferredPreActs) else None


class FiringPattern(OnDemandTensor):
    """`feature_acts.bool()`, or its `.float()`: one where a latent is active."""

    code: Code

    @override
    def __new__(cls, code: Code, shape: Sequence[int], dtype: torch.dtype) -> Self:
        self = OnDemandTensor.__new__(cls, shape, dtype, code.acts.device)
        self.code = code
        return self

    @override
    def compute(self) -> torch.Tensor:
        self.code.require_current()
        return self.code.firing().to(self.dtype).reshape(self.size())

    @override
    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is torch.Tensor.float and len(args) == 1 and not kwargs:
            return FiringPattern(self.code, self.size(), torch.float32)
        if func in (torch.Tensor.sum, torch.sum) and self.dtype == torch.float32:
            dims = (*args[1:], *kwargs.values())
            if len(dims) == 1 and kwargs.keys() <= {"dim"} and self.ndim == 2:
                self.code.require_current()
                if dims[0] in (0, -2):
                    return self.code.latent_counts().to(self.dtype)
                if dims[0] in (1, -1):
                    return self.code.row_counts().to(self.dtype)
        return NotImplemented


class DeferredPreActs(OnDemandTensor):
    """`hidden_pre` of a training step, which nothing in SAELens's trainer reads.

    It can be computed as long as the weights are those of the step.
    """

    code: Code
    _dense_pre_acts: Callable[[Code], torch.Tensor]
    _weights: Sequence[torch.Tensor]
    _versions: list[int]

    @override
    def __new__(
        cls,
        code: Code,
        leading_shape: Sequence[int],
        dense_pre_acts: Callable[[Any], torch.Tensor],
        weights: Sequence[torch.Tensor],
    ) -> Self:
        shape = (*leading_shape, code.d_sae)
        self = OnDemandTensor.__new__(
            cls, shape, code.reported_dtype, code.acts.device, code.acts.requires_grad
        )
        self.code = code
        self._dense_pre_acts = dense_pre_acts
        self._weights = weights
        self._versions = [version_of(weight) for weight in weights]
        return self

    @override
    def compute(self) -> torch.Tensor:
        if self._is_expired:
            raise _expired()
        self.code.require_current()
        return self._dense_pre_acts(self.code).view(self.size())

    @property
    def _is_expired(self) -> bool:
        return [version_of(weight) for weight in self._weights] != self._versions

    @override
    def require_dense_gradient(self) -> None:
        if self.code.acts.requires_grad:
            raise _no_dense_gradient("hidden_pre")

    @override
    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func == _REQUIRES_GRAD:
            return self.code.acts.requires_grad
        if func in _COPIES and self._is_expired:
            return _copy_expired(self, func)
        return NotImplemented


class SquaredErrors(OnDemandTensor):
    """SAELens's squared errors `[..., d_in]`, whose sum over each row a decoder has made."""

    _operands: tuple[torch.Tensor, torch.Tensor]
    _comparison: Comparison

    @override
    def __new__(cls, preds: torch.Tensor, target: torch.Tensor, comparison: Comparison) -> Self:
        self = OnDemandTensor.__new__(
            cls, preds.shape, preds.dtype, preds.device, preds.requires_grad
        )
        self._operands, self._comparison = (preds, target), comparison
        return self

    @override
    def compute(self) -> torch.Tensor:
        if not self._comparison.is_of(*self._operands):
            raise RuntimeError(
                "squared errors were not kept, and the reconstruction or the input has changed in "
                "place since, so that they cannot be computed any more. Read them before."
            )
        return mse_loss(*self._operands)

    @override
    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func == _REQUIRES_GRAD:
            return self._operands[0].requires_grad
        is_sum = func in (torch.Tensor.sum, torch.sum) and kwargs.keys() <= {"dim"}
        if is_sum and [*args[1:], *kwargs.values()] in ([-1], [self.ndim - 1]):
            preds, target = self._operands
            if self._comparison.is_of(preds, target):
                return self._comparison.squared_errors(preds).view(self.shape[:-1])
        return NotImplemented


def squared_errors(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    SAELens's `mse_loss`; made on demand of what the decoder of the step in progress has compared.

    Args:
        preds: `[..., d_in]`.
        target: `[..., d_in]`.
    """
    step = step_in_progress()
    comparison = None if step is None else step.comparison
    has_graph = torch.is_grad_enabled()
    if has_graph and comparison is not None and comparison.is_of(preds, target):
        return SquaredErrors(preds, target, comparison)
    return mse_loss(preds, target)


class ExpiredPreActs(OnDemandTensor):
    """A copy of `hidden_pre` that was made when it could not be computed any more."""

    @override
    def compute(self) -> torch.Tensor:
        raise _expired()

    @override
    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return _copy_expired(self, func) if func in _COPIES else NotImplemented


def _copy_expired(tensor: torch.Tensor, func: Callable[..., Any]) -> Any:
    description = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if func is torch.Tensor.__deepcopy__:
        return ExpiredPreActs(*description)
    return ExpiredPreActs, description


def _expired() -> RuntimeError:
    return RuntimeError(
        "hidden_pre of this training step was not kept, and the weights have changed since, so "
        "that it cannot be computed any more. Read it before the optimizer steps, or set "
        "implementation='dense'."
    )
