"""Whole runs that are measured: language model, hook and SAE by name, and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.load_model import load_model
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from benchmarks.cases import TOPK
from benchmarks.language_models import (
    GEMMA2,
    GPT2,
    LIBRARIES,
    LLAMA_8B,
    LLAMA_OF_GEMMA2_SHAPE,
    ModelShape,
)
from benchmarks.rows import CHECKOUT
from saelens_sparse import SparseTrainingRunner, use_fast_activations_store
from saelens_sparse.compare.embedded_inputs import make_model, make_once
from saelens_sparse.profile.cases import Case, Precision

Runner = LanguageModelSAETrainingRunner
LONG_RUN_STEPS = 100_000
"""What a config says. The measured run is stopped before."""
MIN_PERIOD = {"cuda": 40, "cpu": 10}


@dataclass(frozen=True)
class RunPrecision(Precision):
    """
    The precision of an SAE and of its language model.

    Attributes:
        model_dtype: of the language model's weights. SAELens's `autocast_lm` is on where the SAE's
            autocast is and these are float32.
    """

    model_dtype: torch.dtype = torch.float32

    @property
    def autocast_model(self) -> bool:
        return self.autocast and self.model_dtype == torch.float32


FLOAT32 = RunPrecision("float32", torch.float32)
AUTOCAST = RunPrecision("autocast", torch.float32, autocast=True)
BFLOAT16_MODEL = RunPrecision("bfloat16_model", torch.float32, True, torch.bfloat16)
RUN_PRECISIONS = {one.name: one for one in (FLOAT32, AUTOCAST, BFLOAT16_MODEL)}


@dataclass(frozen=True)
class RunCase(Case):
    """
    A training run.

    Attributes:
        precisions: that it is measured in unless others are asked for.
        shape: of the language model.
        context: tokens of a prompt.
        model_prompts: prompts of a batch of the language model.
        buffer_prompts: prompts in the buffer, SAELens's `n_batches_in_buffer`.
        libraries: "TL" and "HF", those whose models it is run with.
        config: fields of SAELens's runner config that differ from its defaults.
        folder: makes the folder of a transformers model with true weights, in place of random ones.
        stock_ms: milliseconds of stock by 4,096 tokens with TransformerLens on one H100, by
            precision; for estimates.
    """

    precisions: tuple[RunPrecision, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    shape: ModelShape = field(kw_only=True)
    context: int = field(kw_only=True)
    model_prompts: int = field(kw_only=True)
    buffer_prompts: int = field(kw_only=True)
    libraries: tuple[str, ...] = LIBRARIES
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: Callable[[], Path] | None = None
    stock_ms: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def tiny(self) -> RunCase:
        """A case of the same kind for a test on a CPU."""
        return replace(
            self,
            name=f"tiny_{self.name}",
            d_in=self.shape.tiny.d_model,
            d_sae=64,
            sparsity=4,
            batch=64,
            shape=self.shape.tiny,
            context=16,
            model_prompts=4,
            buffer_prompts=80,
            folder=None,
        )

    @property
    def refill_steps(self) -> float:
        """Steps that one refill of the buffer serves, half of it at SAELens's default."""
        return self.buffer_prompts * self.context / 2 / self.batch

    def period(self, device: str) -> int:
        """Steps between two calls of the evaluator."""
        return self.whole_period(MIN_PERIOD[device])

    def whole_period(self, least: int) -> int:
        """The first of `least`, one log later, two ... that is whole refills and whole logs."""
        interval = LoggingConfig().wandb_log_frequency
        period = least
        while period % self.refill_steps or period % interval:
            period += interval
        return period

    def model(self, library: str, precision: RunPrecision, device: str) -> HookedRootModule:
        """The language model of a library."""
        if self.folder is not None:
            names = [self.shape.hook_name(library)]
            path = str(self.folder())
            return load_model("AutoModelForCausalLM", path, device=device, hook_names=names)
        torch.manual_seed(0)
        return self.shape.make(library, precision.model_dtype, device)

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
        self,
        contender: RunContender,
        precision: RunPrecision,
        library: str,
        device: str,
        llm_device: str,
    ) -> LanguageModelSAERunnerConfig[Any]:
        """A long run, whose evaluator is called after every period."""
        logger = LoggingConfig()
        logger.eval_every_n_wandb_logs = self.period(device) // logger.wandb_log_frequency
        return LanguageModelSAERunnerConfig(
            sae=self.sae_config(precision, device, sparse=contender.sparse),
            model_name=self.name,
            hook_name=self.shape.hook_name(library),
            dataset_path="random tokens",
            streaming=False,
            context_size=self.context,
            n_batches_in_buffer=self.buffer_prompts,
            store_batch_size_prompts=self.model_prompts,
            train_batch_size_tokens=self.batch,
            training_tokens=LONG_RUN_STEPS * self.batch,
            device=device,
            llm_device=llm_device,
            act_store_device=device,
            dtype=str(precision.dtype).removeprefix("torch."),
            autocast=precision.autocast,
            autocast_lm=precision.autocast_model,
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
        language_model: what computes the activations of a `SparseTrainingRunner`.
        prepare: applied to the runner before it runs.
        config: fields of SAELens's runner config that it sets.
    """

    name: str
    runner: type[Runner]
    sparse: bool = True
    language_model: Literal["auto", "saelens"] = "saelens"
    prepare: Callable[[Runner], object] | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def build(
        self, cfg: LanguageModelSAERunnerConfig[Any], model: HookedRootModule, dataset: Any
    ) -> Runner:
        """The runner, with SAE weights that depend on the seed only."""
        torch.manual_seed(0)
        overrides: dict[str, Any] = {"override_dataset": dataset, "override_model": model}
        if issubclass(self.runner, SparseTrainingRunner):
            overrides["language_model"] = self.language_model
        runner = self.runner(cfg, **overrides)
        if self.prepare is not None:
            self.prepare(runner)
        return runner


_FAST_STORE = partial(use_fast_activations_store, language_model="saelens")
CONTENDERS = {
    contender.name: contender
    for contender in (
        RunContender("stock", Runner, sparse=False),
        RunContender("sparse", Runner),
        RunContender("sparse_fast_store", Runner, prepare=_FAST_STORE),
        RunContender("sparse_runner_stock_store", StockStoreRunner),
        RunContender("sparse_runner_saelens_model", SparseTrainingRunner),
        RunContender("sparse_runner", SparseTrainingRunner, language_model="auto"),
        RunContender(
            "sparse_runner_prefetch",
            SparseTrainingRunner,
            language_model="auto",
            config={"prefetch_llm_batches": True},
        ),
    )
}
DEFAULT_CONTENDERS = ["stock", "sparse_runner_saelens_model", "sparse_runner"]


def smollm2() -> Path:
    """The folder of SmolLM2-135M, which the demo keeps."""
    folder = CHECKOUT / ".cache" / "smollm2-135m"
    make_once(folder, make_model)
    return folder


_SMOLLM2 = ModelShape("llama", 8, 576, 9, 3, 64, 1536, 49_152, 128)
_CPU = ModelShape("gpt2", 1, 128, 2, 2, 64, 512, 2048, 128)

CASES = {
    case.name: case
    for case in (
        RunCase(
            "gpt2", TOPK, 768, 24_576, 32, 4096, (AUTOCAST, BFLOAT16_MODEL),
            shape=GPT2, context=128, model_prompts=64, buffer_prompts=640,
            stock_ms={"autocast": 43, "bfloat16_model": 43, "float32": 60},
        ),
        RunCase(
            "llama_of_gemma2_shape", TOPK, 2304, 65_536, 64, 4096,
            (AUTOCAST, BFLOAT16_MODEL, FLOAT32),
            shape=LLAMA_OF_GEMMA2_SHAPE, context=1024, model_prompts=8, buffer_prompts=160,
            config={"n_eval_batches": 2},
            stock_ms={"autocast": 103, "bfloat16_model": 80, "float32": 395},
        ),
        RunCase(
            "gemma2", TOPK, 2304, 65_536, 64, 4096, (AUTOCAST, BFLOAT16_MODEL),
            shape=GEMMA2, context=1024, model_prompts=8, buffer_prompts=160,
            config={"n_eval_batches": 2},
            stock_ms={"autocast": 115, "bfloat16_model": 90, "float32": 420},
        ),
        RunCase(
            "llama_8b", TOPK, 4096, 131_072, 64, 4096, (BFLOAT16_MODEL,),
            shape=LLAMA_8B, context=1024, model_prompts=8, buffer_prompts=160,
            config={"n_eval_batches": 2},
            stock_ms={"bfloat16_model": 286},
        ),
        RunCase(
            "cpu", TOPK, 128, 2048, 16, 512, (FLOAT32,),
            shape=_CPU, context=128, model_prompts=8, buffer_prompts=80,
        ),
        RunCase(
            "smollm2", TOPK, 576, 8192, 32, 1024, (FLOAT32,),
            shape=_SMOLLM2, context=128, model_prompts=16, buffer_prompts=160,
            libraries=("HF",), config={"n_eval_batches": 1}, folder=smollm2,
        ),
    )
}  # fmt: skip
DEFAULT_CASES = {
    "cuda": ["gpt2", "llama_of_gemma2_shape", "gemma2", "llama_8b"],
    "cpu": ["cpu"],
}
