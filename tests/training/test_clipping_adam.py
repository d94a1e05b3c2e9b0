"""Clipping and Adam in one pass, against PyTorch's two, and the kernel of the update."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch.optim import Adam

from saelens_sparse.architectures.parameters import mark_parameter
from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_update
from saelens_sparse.training.optimizer import ClippingAdam, prepare_optimizers
from tests.conftest import Target, target_parameters

# The kernel of the update has a test of its own.
everywhere = pytest.mark.parametrize("target", target_parameters(interpreted=False))


def parameters(
    dtype: torch.dtype, device: torch.device, *, marked: bool = True
) -> list[torch.nn.Parameter]:
    """Two matrices, one with rows that are not the first dimension of its memory, and a vector."""
    torch.manual_seed(0)
    values = [torch.randn(30, 47), torch.randn(47, 30).T, torch.randn(1030)]
    made = [torch.nn.Parameter(value.to(device, dtype)) for value in values]
    for parameter in made if marked else ():
        mark_parameter(parameter, True)
    return made


class TestClippingAdam:
    @everywhere
    @pytest.mark.parametrize("max_norm", [1e-2, 1e9], ids=["clipped", "not clipped"])
    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)], ids=str)
    @pytest.mark.parametrize("marked", [True, False], ids=["fused", "as it is"])
    def test_is_clipping_and_then_adam(
        self, target: Target, max_norm: float, betas: tuple[float, float], marked: bool
    ) -> None:
        prepare_optimizers()
        for dtype in target.dtypes:
            device = torch.device(target.device)
            actual = parameters(dtype, device, marked=marked)
            expected = parameters(torch.float64, device, marked=False)
            yardstick = parameters(dtype, device, marked=False)
            optimizer = ClippingAdam(actual, max_norm=max_norm, lr=1e-2, betas=betas)
            references = [Adam(made, lr=1e-2, betas=betas) for made in (expected, yardstick)]
            for _ in range(5):
                for trio in zip(actual, expected, yardstick, strict=True):
                    gradient = torch.randn_like(trio[0])
                    for parameter in trio:
                        parameter.grad = torch.empty_like(parameter).copy_(gradient)
                optimizer.step()
                for made, reference in zip((expected, yardstick), references, strict=True):
                    torch.nn.utils.clip_grad_norm_(made, max_norm)
                    reference.step()
            eps = torch.finfo(dtype).eps
            for ours, exact, theirs in zip(actual, expected, yardstick, strict=True):
                allowed = 2 * (theirs - exact).norm() + 4 * eps * exact.norm()
                assert (ours - exact).norm() <= allowed
                state = optimizer.state[ours]
                assert state["step"].item() == 5
                assert state["exp_avg"].stride() == ours.stride()

    @everywhere
    def test_a_nan_and_an_infinity_go_where_they_do_in_stock(self, target: Target) -> None:
        prepare_optimizers()
        for bad in (float("nan"), float("inf")):
            results = []
            for clipping in (True, False):
                made = parameters(torch.float32, torch.device(target.device), marked=clipping)
                for parameter in made:
                    parameter.grad = torch.ones_like(parameter)
                assert made[0].grad is not None
                made[0].grad[3, 4] = bad
                if clipping:
                    ClippingAdam(made, max_norm=1.0).step()
                else:
                    torch.nn.utils.clip_grad_norm_(made, 1.0)
                    Adam(made).step()
                results.append([parameter.isnan() for parameter in made])
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs)

    @everywhere
    def test_parameters_without_a_gradient_stay_as_they_are(self, target: Target) -> None:
        made = parameters(torch.float32, torch.device(target.device))
        before = made[1].detach().clone()
        optimizer = ClippingAdam(made, max_norm=1.0)
        optimizer.step()
        for index in (0, 2):
            made[index].grad = torch.ones_like(made[index])
        optimizer.step()
        assert torch.equal(made[1], before)
        assert len(optimizer.state_dict()["state"]) == 2

    @everywhere
    def test_tells_autograd_that_parameters_changed(self, target: Target) -> None:
        made = parameters(torch.float32, torch.device(target.device))
        for parameter in made:
            parameter.grad = torch.ones_like(parameter)
        versions = [parameter._version for parameter in made]
        ClippingAdam(made, max_norm=1.0).step()
        assert all(p._version > version for p, version in zip(made, versions, strict=True))

    @everywhere
    @pytest.mark.parametrize(
        "settings", [{"weight_decay": 0.5}, {"maximize": True}, {"amsgrad": True}], ids=str
    )
    def test_other_settings_of_adam_are_obeyed(
        self, target: Target, settings: dict[str, Any]
    ) -> None:
        prepare_optimizers()
        device = torch.device(target.device)
        ours, theirs = (
            parameters(torch.float32, device, marked=marked) for marked in (True, False)
        )
        clipping = ClippingAdam(ours, max_norm=1e-2, lr=1e-2, **settings)
        reference = Adam(theirs, lr=1e-2, **settings)
        for _ in range(3):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.empty_like(a).copy_(torch.randn_like(a))
                b.grad = a.grad.clone()
            clipping.step()
            torch.nn.utils.clip_grad_norm_(theirs, 1e-2)
            reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_survives_a_copy(self) -> None:
        made = parameters(torch.float32, torch.device("cpu"))
        optimizer = copy.deepcopy(ClippingAdam(made, max_norm=2.0))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert optimizer.max_norm == 2.0

    def test_a_closure_is_refused(self) -> None:
        optimizer = ClippingAdam(parameters(torch.float32, torch.device("cpu")), max_norm=1.0)
        with pytest.raises(ValueError, match="closure must be None"):
            optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("n", [1, 1023, 1024, 5000])
def test_adam_update(target: Target, n: int) -> None:
    if target.backend != "triton":
        pytest.skip("a kernel")
    for dtype, betas in itertools.product(target.dtypes, [(0.9, 0.999), (0.0, 0.99)]):
        p, g, m, v = (torch.randn(n, device=target.device, dtype=dtype) for _ in range(4))
        v = v.square()
        (beta1, beta2), step, divisor, lr, eps = betas, 3, 1.7, 0.02, 1e-8
        first = beta1 * m.double() + (1 - beta1) * g.double() / divisor
        second = beta2 * v.double() + (1 - beta2) * (g.double() / divisor) ** 2
        change = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        expected = (p.double() - lr * change, first, second)
        scalars = [torch.tensor(x, device=target.device) for x in (float(step), divisor, lr)]
        settings = AdamSettings(scalars[2], beta1, beta2, eps)
        adam_update(p, g, m, v, scalars[0], scalars[1], settings)
        for actual, value in zip((p, m, v), expected, strict=True):
            distance = (actual.double() - value).norm()
            assert distance <= 8 * torch.finfo(dtype).eps * value.norm(), (dtype, betas)
