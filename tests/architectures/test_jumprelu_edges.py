"""JumpReLU where only exact arithmetic tells on which side of an edge a pre-activation is."""

import torch
from sae_lens import JumpReLUTrainingSAE

from tests.conftest import Target
from tests.support.jumprelu import (
    D_IN,
    D_SAE,
    compare_jumprelu_steps,
    edge_distances,
    every_path,
    make_jumprelu,
    pre_acts,
    sparse_jumprelu,
)
from tests.support.saes import (
    FLOAT32,
    forward_pass,
    stock_like,
)


def on_grid(shape: tuple[int, ...], limit: int, unit: float) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape) * unit


class TestEdges:
    """Pre-activations so near to an edge that only exact arithmetic tells on which side."""

    BANDWIDTH = 2.0**-4

    def exact_case(self, target: Target) -> tuple[JumpReLUTrainingSAE, torch.Tensor]:
        """Inputs whose pre-activations float32 computes exactly in any order of summation.

        Inputs have 12 bits, more than float16 holds; weights have 7: products sum in 24 bits.
        """
        n_rows = 6 if target.interpreted else 40
        stock = make_jumprelu(
            device=target.device,
            jumprelu_bandwidth=self.BANDWIDTH,
            apply_b_dec_to_input=False,
        )
        with torch.no_grad():
            stock.W_enc.copy_(on_grid((D_IN, D_SAE), 127, 2.0**-7))
            stock.b_enc.copy_(on_grid((D_SAE,), 2**14, 2.0**-17))
        x = on_grid((n_rows, D_IN), 4095, 2.0**-11).to(target.device)
        assert not torch.equal(x, x.half().float())
        hidden_pre = pre_acts(stock, x)
        exact = x[:, :6] @ stock.W_enc[:6] + x[:, 6:] @ stock.W_enc[6:] + stock.b_enc
        assert torch.equal(exact.double(), hidden_pre)
        return stock, x

    def near_row(
        self, hidden_pre: torch.Tensor, offsets: list[float], *, relative: bool
    ) -> torch.Tensor:
        """A threshold per latent, at an offset from its pre-activation on some row."""
        n_rows, d_sae = hidden_pre.shape
        latents = torch.arange(d_sae)
        # A row on which the latent's pre-activation is positive.
        first = (hidden_pre > 0.2).double().argmax(0)
        near = hidden_pre[first, latents.to(first.device)]
        offset = torch.tensor(offsets, dtype=torch.float64)[latents % len(offsets)].to(near)
        assert n_rows > 1
        return (near * (1 + offset) if relative else near + offset).float()

    def require_same_gates(
        self, stock: JumpReLUTrainingSAE, target: Target, x: torch.Tensor
    ) -> None:
        oracle, sparse = stock_like(stock), sparse_jumprelu(stock, target.backend)
        outputs = [forward_pass(oracle, x.double()), forward_pass(sparse, x)]
        expected, actual = (output.feature_acts.detach() > 0 for output in outputs)
        assert torch.equal(actual, expected)
        expected, actual = (output.losses["l0_loss"].double() for output in outputs)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        # Of the threshold, the L0 loss has a gradient of one unit per row in the window.
        counts = []
        for sae, output in zip((oracle, sparse), outputs, strict=True):
            (gradient,) = torch.autograd.grad(output.losses["l0_loss"], [sae.threshold])
            counts.append((-gradient * len(x) * self.BANDWIDTH).double().cpu())
        torch.testing.assert_close(counts[1], counts[0], rtol=1e-5, atol=1e-5)
        assert counts[0].sum() > 0
        for row in x[:3].split(1):
            expected, actual = (sae.encode(row.to(sae.dtype)) > 0 for sae in (oracle, sparse))
            assert torch.equal(actual, expected)

    @every_path
    def test_a_gate_is_exact_to_the_last_bit_and_strict(self, target: Target) -> None:
        stock, x = self.exact_case(target)
        ulp = torch.finfo(torch.float32).eps
        offsets = [0.0, ulp, -ulp, 4 * ulp, -4 * ulp, 1e-6, -1e-6, 2e-5, -2e-5, 3e-4, -3e-4]
        hidden_pre = pre_acts(stock, x)
        with torch.no_grad():
            stock.threshold.copy_(self.near_row(hidden_pre, offsets, relative=True))
        distance = (hidden_pre - stock.threshold).abs()
        assert (distance == 0).sum() >= D_SAE // len(offsets), "no tie was made"
        assert ((distance > 0) & (distance < 1e-6)).sum() >= D_SAE // len(offsets)
        self.require_same_gates(stock, target, x)

    @every_path
    def test_an_edge_of_the_window_is_exact_to_the_last_bit_and_strict(
        self, target: Target
    ) -> None:
        stock, x = self.exact_case(target)
        unit = 2.0**-17
        half = self.BANDWIDTH / 2
        offsets = [sign * half + n * unit for sign in (1, -1) for n in (0, 1, -1, 5, -5)]
        hidden_pre = pre_acts(stock, x)
        with torch.no_grad():
            stock.threshold.copy_(self.near_row(hidden_pre, offsets, relative=False))
        on_the_edge = (hidden_pre - stock.threshold).abs() == half
        assert on_the_edge.sum() >= 2 * (D_SAE // len(offsets)), "no tie was made"
        self.require_same_gates(stock, target, x)

    @every_path
    def test_gates_nearer_than_a_float16_screen_can_tell(self, target: Target) -> None:
        """Far enough for float32 on ordinary values, and within the error of half precision."""
        stock = make_jumprelu(d_in=32, device=target.device, jumprelu_bandwidth=self.BANDWIDTH)
        x = torch.randn(target.few_rows(64), 32, device=target.device)
        hidden_pre = pre_acts(stock, x)
        offsets = [3e-5, -3e-5, 6e-5, -6e-5, 1e-4, -1e-4, 3e-4, -3e-4]
        with torch.no_grad():
            stock.threshold.copy_(self.near_row(hidden_pre, offsets, relative=True))
        # Rows that happen to be nearer to some edge than float32 can tell.
        keep = (edge_distances(stock, hidden_pre) > 4e-6).all(1)
        x, hidden_pre = x[keep], hidden_pre[keep]
        assert keep.double().mean() > 0.5
        distance = (hidden_pre - stock.threshold).abs()
        assert (distance < 3e-4 * hidden_pre.abs()).sum() > D_SAE // 4
        half_precision = (x.half() @ stock.W_enc.half()).double() + stock.b_enc
        active = hidden_pre > stock.threshold
        if stock.cfg.apply_b_dec_to_input:
            half_precision -= (stock.b_dec @ stock.W_enc).double()
        assert ((half_precision > stock.threshold) != active).any(), "half precision tells too"
        self.require_same_gates(stock, target, x)
        if not target.interpreted:
            compare_jumprelu_steps(stock, target, x, None, FLOAT32, input_gradient=True)
