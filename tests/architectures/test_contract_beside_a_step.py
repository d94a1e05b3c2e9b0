"""Encoding and decoding in other ways than a training step does: frozen encoders, gradients of
gradients, buffers that are used again, threads, files.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from saelens_sparse.codes.on_demand import OnDemandTensor
from tests.support.architectures import NOT_INTERPRETED, ON_CPU, Subject, subjects
from tests.support.saes import dead_mask, error, forward_pass, require_same_gradients
from tests.support.trainers import make_trainer


class TestFrozenEncoder:
    """Activations encoded without a graph, decoded with one."""

    @pytest.mark.parametrize(
        "context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
    )
    @subjects(options="few")
    def test_decoder_only_fine_tuning(
        self, subject: Subject, options: dict[str, Any], context: Callable[[], Any]
    ) -> None:
        stock, x = subject.case(n_rows=20, **options)
        sparse = subject.sparse(stock)
        for sae in (stock, sparse):
            with context():
                acts, _ = sae.encode_with_hidden_pre(x)
            if context is torch.inference_mode:
                acts = acts.clone()
            (sae.decode(acts) - x).pow(2).sum().backward()
            assert sae.W_dec.grad is not None
        require_same_gradients(sparse, stock)

    @subjects(NOT_INTERPRETED)
    def test_a_frozen_encoder_within_the_graph(self, subject: Subject) -> None:
        """The decoder's norms steer what is encoded, as long as the decoder is trained."""
        stock, x = subject.case(n_rows=20)
        sparse = subject.sparse(stock)
        for sae in (stock, sparse):
            for name in ("W_enc", "b_enc"):
                getattr(sae, name).requires_grad_(False)
            forward_pass(sae, x).loss.backward()
        require_same_gradients(sparse, stock)

    @subjects(ON_CPU)
    def test_the_decoder_becomes_trainable_after_encoding(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=20)
        sparse = subject.sparse(stock)
        for sae in (stock, sparse):
            sae.W_dec.requires_grad_(False)
            acts, _ = sae.encode_with_hidden_pre(x)
            sae.W_dec.requires_grad_(True)
            sae.decode(acts).pow(2).sum().backward()
        require_same_gradients(sparse, stock)


class TestSecondDerivatives:
    """Sparse backward passes are not differentiable: whoever asks for their graph is told so."""

    @pytest.mark.parametrize("use", ["grad", "backward"])
    @subjects()
    def test_a_graph_of_the_gradient_is_refused(self, subject: Subject, use: str) -> None:
        stock, x = subject.case(n_rows=6)
        sparse = subject.sparse(stock)
        x = x.detach().clone().requires_grad_()
        uses: dict[str, Callable[[], Any]] = {
            "grad": lambda: torch.autograd.grad(sparse(x).sum(), x, create_graph=True),
            "backward": lambda: forward_pass(sparse, x).loss.backward(create_graph=True),
        }
        with pytest.raises(RuntimeError, match=r"create_graph=True.*implementation='dense'"):
            uses[use]()

    @subjects(NOT_INTERPRETED)
    def test_one_of_a_single_part_is_refused(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        sparse = subject.sparse(stock)
        acts, _ = sparse.encode_with_hidden_pre(x)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(acts.sum(), sparse.W_enc, create_graph=True)
        acts, _ = sparse.encode_with_hidden_pre(x.detach())
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(sparse.decode(acts).sum(), sparse.W_dec, create_graph=True)

    @subjects(NOT_INTERPRETED)
    def test_dense_supports_them(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        penalties = []
        for sae in (stock, subject.sparse(stock, "dense")):
            rows = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(sae(rows).sum(), rows, create_graph=True)
            gradient.pow(2).sum().backward()
            penalties.append(sae.W_dec.grad)
        assert penalties[0].norm() > 0
        torch.testing.assert_close(penalties[1], penalties[0])


class TestReusedInput:
    """A caller fills its input buffer again before it looks at the result."""

    @pytest.mark.parametrize("refill", ["in place", "past autograd"])
    @subjects(NOT_INTERPRETED)
    def test_pre_activations_are_those_of_the_input_that_was_encoded(
        self, subject: Subject, refill: str
    ) -> None:
        for centred in (True, False):
            stock, x = subject.case(n_rows=6, apply_b_dec_to_input=centred)
            sparse = subject.sparse(stock)
            buffer = x.clone()
            expected = stock.encode_with_hidden_pre(x)
            actual = sparse.encode_with_hidden_pre(buffer)
            (buffer if refill == "in place" else buffer.data).fill_(3.0)
            for value, wanted in zip(actual, expected, strict=True):
                torch.testing.assert_close(value.clone(), wanted)

    @subjects(NOT_INTERPRETED)
    def test_gradients_are_too(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6, apply_b_dec_to_input=False)
        sparse = subject.sparse(stock)
        buffer = x.clone()
        acts, _ = sparse.encode_with_hidden_pre(buffer)
        recons = sparse.decode(acts)
        buffer.data.fill_(3.0)
        recons.pow(2).sum().backward()
        stock.decode(stock.encode_with_hidden_pre(x)[0]).pow(2).sum().backward()
        require_same_gradients(sparse, stock)


READERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "register_hook": lambda acts, _: acts.register_hook(torch.neg),
    "retain_grad": lambda acts, _: acts.retain_grad(),
    "autograd.grad": lambda acts, loss: torch.autograd.grad(loss, acts),
    "backward, and its inputs' grad": lambda acts, loss: (
        loss.backward(inputs=[acts]),
        acts.grad,
    ),
    "autograd.grad of a list": lambda acts, loss: torch.autograd.grad([loss], inputs=[acts]),
}


class TestGradientsOfActivations:
    """What a sparse decode has read has no dense gradient: whoever asks for it is told so."""

    @pytest.mark.parametrize("name", ["feature_acts", "hidden_pre"])
    @pytest.mark.parametrize("reader", READERS)
    @subjects(NOT_INTERPRETED)
    def test_after_a_training_step(self, subject: Subject, reader: str, name: str) -> None:
        stock, x = subject.case(n_rows=6)
        output = forward_pass(subject.sparse(stock), x)
        assert isinstance(output.feature_acts, OnDemandTensor)
        with pytest.raises(RuntimeError, match=rf"{name}.*implementation='dense'"):
            READERS[reader](getattr(output, name), output.loss)

    @subjects(NOT_INTERPRETED)
    def test_before_decoding_they_are_there(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        seen: list[list[torch.Tensor]] = []
        for sae in (stock, subject.sparse(stock)):
            gradients_seen: list[torch.Tensor] = []
            acts, _ = sae.encode_with_hidden_pre(x)
            acts.register_hook(gradients_seen.append)
            sae.decode(acts).pow(2).sum().backward()
            seen.append(gradients_seen)
        ((expected,), (actual,)) = seen
        assert error(actual, expected) <= 1e-5 * expected.norm()


class TestOtherDecoders:
    """Activations of one SAE that another one decodes, or the same with another decoder."""

    @pytest.mark.parametrize("change", ["another SAE", "another parameter"])
    @subjects(options="few")
    def test_the_decoder_that_decodes_counts(
        self, subject: Subject, options: dict[str, Any], change: str
    ) -> None:
        stock, x = subject.case(n_rows=12, **options)
        with torch.no_grad():
            other_stock = copy.deepcopy(stock)
            other_stock.W_dec.mul_(torch.linspace(0.5, 2, stock.cfg.d_sae).to(x).unsqueeze(1))
        pairs: list[tuple[Any, Any]] = [(stock, other_stock)]
        pairs.append((subject.sparse(stock), subject.sparse(other_stock)))
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        for sae, other in pairs:
            acts, _ = sae.encode_with_hidden_pre(x)
            if change == "another parameter":
                sae.W_dec = torch.nn.Parameter(other.W_dec.detach().clone())
                other = sae
            recons = other.decode(acts)
            recons.pow(2).sum().backward()
            assert other.W_dec.grad is not None
            results.append((recons.detach(), other.W_dec.grad))
        for actual, expected in zip(results[1], results[0], strict=True):
            assert error(actual, expected) <= 1e-5 * expected.norm()


class TestCompiled:
    """`torch.compile` of an SAE, which breaks its graph at the sparse parts."""

    @pytest.fixture(autouse=True)
    def nothing_is_compiled_yet(self) -> None:
        """PyTorch limits how often it compiles a method, and all architectures share some."""
        torch.compiler.reset()

    @subjects(ON_CPU)
    def test_gives_what_the_sae_gives(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        for method in ("forward", "encode"):
            sparse = subject.sparse(stock)
            compiled: Any = torch.compile(getattr(sparse, method), backend="eager")
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(compiled(x), getattr(stock, method)(x))

    @subjects(ON_CPU)
    def test_a_dense_sae_is_one_graph_as_in_stock(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        for method in ("forward", "encode"):
            sparse = subject.sparse(stock, "dense")
            compiled: Any = torch.compile(getattr(sparse, method), backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), getattr(stock, method)(x))

    @subjects(ON_CPU)
    def test_a_dense_step_is_one_graph_where_stock_s_is(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        is_one: list[bool] = []
        for sae in (stock, subject.sparse(stock, "dense")):
            torch.compiler.reset()
            explained = torch._dynamo.explain(lambda x, sae=sae: forward_pass(sae, x).loss)(x)
            is_one.append(explained.graph_break_count == 0)
        assert is_one[1] == is_one[0]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return values * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return 2 * grads[0]


class TestCustomFunctions:
    """PyTorch gives a custom autograd.Function the tensor itself, past what makes it ordinary."""

    @pytest.mark.parametrize("name", ["feature_acts", "hidden_pre"])
    @subjects(NOT_INTERPRETED)
    def test_their_gradient_is_refused(self, subject: Subject, name: str) -> None:
        stock, x = subject.case(n_rows=6)
        output = forward_pass(subject.sparse(stock), x)
        values: Any = Doubled.apply(getattr(output, name))
        assert values.requires_grad
        torch.testing.assert_close(values, 2 * getattr(forward_pass(stock, x), name))
        with pytest.raises(RuntimeError, match=r"custom autograd\.Function"):
            (values.sum() + output.loss).backward()

    @subjects(NOT_INTERPRETED)
    def test_a_clone_has_a_gradient(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        sparse = subject.sparse(stock)
        for sae in (stock, sparse):
            values: Any = Doubled.apply(sae.encode_with_hidden_pre(x)[0].clone())
            values.pow(2).sum().backward()
        require_same_gradients(sparse, stock)

    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    @subjects(NOT_INTERPRETED)
    def test_checkpointing(self, subject: Subject, reentrant: bool) -> None:
        stock, x = subject.case(n_rows=6)
        sparse = subject.sparse(stock)
        for sae in (stock, sparse):
            rows = x.detach().clone().requires_grad_()
            loss: Any = checkpoint(
                lambda rows, sae=sae: forward_pass(sae, rows).loss, rows, use_reentrant=reentrant
            )
            loss.backward()
        require_same_gradients(sparse, stock)


class TestInferenceMode:
    @subjects(NOT_INTERPRETED)
    def test_an_sae_made_in_it(self, subject: Subject) -> None:
        with torch.inference_mode():
            stock = subject.stock()
            x = subject.inputs(stock, 6)
            sparse = subject.sparse(stock)
            for sae in (stock, sparse):
                sae.eval()
            torch.testing.assert_close(sparse(x), stock(x))
            torch.testing.assert_close(sparse.encode(x), stock.encode(x))
            output, expected = (forward_pass(sae, x) for sae in (sparse, stock))
            torch.testing.assert_close(output.loss, expected.loss)
            torch.testing.assert_close(output.hidden_pre.clone(), expected.hidden_pre)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), stock(x))


class TestThreads:
    @subjects(ON_CPU)
    def test_forward_passes_of_one_sae_at_once(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=24)
        sparse = subject.sparse(stock)
        masks = [dead_mask(stock, n_dead) for n_dead in (0, 3, 12, 20)]
        inputs = [x[6 * i : 6 * i + 6] for i in range(4)]
        expected = [
            forward_pass(stock, rows, mask) for rows, mask in zip(inputs, masks, strict=True)
        ]
        failures: list[str] = []
        start = threading.Barrier(4)

        def work(index: int) -> None:
            start.wait()
            for _ in range(15):
                try:
                    output = forward_pass(sparse, inputs[index], masks[index])
                    for name, value in expected[index].losses.items():
                        torch.testing.assert_close(output.losses[name], value)
                    torch.testing.assert_close(
                        sparse.encode(inputs[index]), expected[index].feature_acts
                    )
                except Exception as problem:
                    failures.append(f"{index}: {problem!r}")

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda output: pickle.loads(pickle.dumps(output)),
    "deepcopy": copy.deepcopy,
    "deepcopy of a pickle": lambda output: copy.deepcopy(pickle.loads(pickle.dumps(output))),
}


class TestCopiedOutputs:
    """An output that is sent to another process, or kept, after the weights have changed."""

    @pytest.mark.parametrize("changed", [False, True], ids=["", "after the update"])
    @pytest.mark.parametrize("copied", COPIES)
    @subjects(NOT_INTERPRETED)
    def test_hold_what_is_still_known(self, subject: Subject, copied: str, changed: bool) -> None:
        stock, x = subject.case(n_rows=6)
        sparse = subject.sparse(stock)
        with torch.no_grad():
            expected = forward_pass(stock, x)
            output = forward_pass(sparse, x)
            if changed:
                for parameter in sparse.parameters():
                    parameter.mul_(2)
            again = COPIES[copied](output)
        torch.testing.assert_close(again.sae_out, expected.sae_out)
        torch.testing.assert_close(again.feature_acts.clone(), expected.feature_acts)
        assert again.hidden_pre.shape == expected.hidden_pre.shape
        if not changed:
            torch.testing.assert_close(again.hidden_pre.clone(), expected.hidden_pre)
            return
        with pytest.raises(RuntimeError, match=r"hidden_pre .* weights have changed .*'dense'"):
            again.hidden_pre.max()

    @subjects(NOT_INTERPRETED)
    def test_of_a_trainer_s_step(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=6)
        expected = forward_pass(stock, x).feature_acts.detach()
        output = make_trainer(subject.sparse(stock)).step(x)
        again = pickle.loads(pickle.dumps(output))
        torch.testing.assert_close(again.feature_acts.detach(), expected)
