"""Whole runs that are measured: language model, hook and SAE by name, and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from benchmarks.cases import TOPK
from saelens_sparse import SparseTrainingRunner, use_fast_activations_store
from saelens_sparse.profile.cases import AUTOCAST, FLOAT32, Case, Precision

Runner = LanguageModelSAETrainingRunner


def gpt2_shaped(
    layers: int, d_model: int, context: int, vocabulary: int, d_head: int = 64
) -> Callable[[str], HookedRootModule]:
    """Makes TransformerLens models of GPT-2's architecture on a device, with random weights."""

    def make(device: str) -> HookedRootModule:
        config = HookedTransformerConfig(
            n_layers=layers,
            d_model=d_model,
            n_ctx=context,
            d_head=d_head,
            n_heads=d_model // d_head,
            d_mlp=4 * d_model,
            d_vocab=vocabulary,
            act_fn="gelu_new",
            normalization_type="LN",
            device=device,
            seed=0,
        )
        return HookedTransformer(config)

    return make


@dataclass(frozen=True)
class RunCase(Case):
    """
    A training run.

    Attributes:
        model: makes the language model on a device.
        vocabulary: token ids are below it.
        hook_name: where the SAE is.
        context: tokens of a prompt.
        model_prompts: prompts of a batch of the language model.
        buffer_prompts: prompts in the buffer, SAELens's `n_batches_in_buffer`.
        config: fields of SAELens's runner config that differ from its defaults.
    """

    model: Callable[[str], HookedRootModule] = field(kw_only=True)
    vocabulary: int = field(kw_only=True)
    hook_name: str = field(kw_only=True)
    context: int = field(kw_only=True)
    model_prompts: int = field(kw_only=True)
    buffer_prompts: int = field(kw_only=True)
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def refill_steps(self) -> float:
        """Steps that one refill of the buffer serves, half of it at SAELens's default."""
        return self.buffer_prompts * self.context / 2 / self.batch

    def sae_config(self, precision: Precision, device: str, *, sparse: bool) -> Any:
        """The config of the sparse SAE, or of SAELens's own that trains the same."""
        registered = self.registered
        kind = registered.config if sparse else registered.stock_config
        return kind(
            d_in=self.d_in,
            d_sae=self.d_sae,
            dtype=str(precision.dtype).removeprefix("torch."),
            device=device,
            **self.sae_options,
        )

    def runner_config(
        self, contender: RunContender, precision: Precision, device: str, steps: int, period: int
    ) -> LanguageModelSAERunnerConfig[Any]:
        """A run of `steps` steps, whose evaluator is called after every `period` of them."""
        logger = LoggingConfig()
        logger.eval_every_n_wandb_logs = period // logger.wandb_log_frequency
        return LanguageModelSAERunnerConfig(
            sae=self.sae_config(precision, device, sparse=contender.sparse),
            model_name=self.name,
            hook_name=self.hook_name,
            dataset_path="random tokens",
            streaming=False,
            context_size=self.context,
            n_batches_in_buffer=self.buffer_prompts,
            store_batch_size_prompts=self.model_prompts,
            train_batch_size_tokens=self.batch,
            training_tokens=steps * self.batch,
            device=device,
            dtype=str(precision.dtype).removeprefix("torch."),
            autocast=precision.autocast,
            autocast_lm=precision.autocast,
            logger=logger,
            checkpoint_path=None,
            output_path=None,
            verbose=False,
            **{**self.config, **contender.config},
        )


class StockStoreRunner(SparseTrainingRunner):
    """`SparseTrainingRunner` with SAELens's activation store."""

    @override
    def prepare_store(self) -> None:
        """Leave the store as it is."""


@dataclass(frozen=True)
class RunContender:
    """
    A way to run the training of a case.

    Attributes:
        name: key of its rows.
        runner: class of the runner.
        sparse: whether it trains the sparse architecture, not SAELens's own.
        prepare: applied to the runner before it runs.
        config: fields of SAELens's runner config that it sets.
    """

    name: str
    runner: type[Runner]
    sparse: bool = True
    prepare: Callable[[Runner], object] | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def build(
        self, cfg: LanguageModelSAERunnerConfig[Any], model: HookedRootModule, dataset: Any
    ) -> Runner:
        """The runner, with SAE weights that depend on the seed only."""
        torch.manual_seed(0)
        runner = self.runner(cfg, override_dataset=dataset, override_model=model)
        if self.prepare is not None:
            self.prepare(runner)
        return runner


CONTENDERS = {
    contender.name: contender
    for contender in (
        RunContender("stock", Runner, sparse=False),
        RunContender("sparse", Runner),
        RunContender("sparse_fast_store", Runner, prepare=use_fast_activations_store),
        RunContender("sparse_runner_stock_store", StockStoreRunner),
        RunContender("sparse_runner", SparseTrainingRunner),
        RunContender(
            "sparse_runner_prefetch", SparseTrainingRunner, config={"prefetch_llm_batches": True}
        ),
    )
}
DEFAULT_CONTENDERS = ["stock", "sparse", "sparse_runner_stock_store", "sparse_runner"]

CASES = {
    case.name: case
    for case in (
        RunCase(
            "gpt2", TOPK, 768, 24_576, 32, 4096, (AUTOCAST,),
            model=gpt2_shaped(layers=12, d_model=768, context=128, vocabulary=50_257),
            vocabulary=50_257, hook_name="blocks.8.hook_resid_post", context=128,
            model_prompts=64, buffer_prompts=640,
        ),
        RunCase(
            "cpu", TOPK, 128, 2048, 16, 512, (FLOAT32,),
            model=gpt2_shaped(layers=2, d_model=128, context=128, vocabulary=2048),
            vocabulary=2048, hook_name="blocks.1.hook_resid_post", context=128,
            model_prompts=8, buffer_prompts=80,
        ),
        RunCase(
            "tiny", TOPK, 16, 64, 4, 64, (FLOAT32,),
            model=gpt2_shaped(layers=2, d_model=16, context=16, vocabulary=128, d_head=8),
            vocabulary=128, hook_name="blocks.0.hook_resid_post", context=16,
            model_prompts=4, buffer_prompts=80,
        ),
    )
}  # fmt: skip
DEFAULT_CASES = {"cuda": ["gpt2"], "cpu": ["cpu"]}
