"""What this package uses of its dependencies that is not public: every such name, in one place.

A release may drop or change such a name without notice. Importing this module then fails with one
line that says which name is missing and which releases have it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import llm_sae_training_runner
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.training import activations_store
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch.autograd import profiler
from torch.optim import Adam
from torch.optim.adam import adam
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from sae_lens import LanguageModelSAERunnerConfig

# The releases that the test suite has been run with.
TESTED = {"sae-lens": "6.54.12", "torch": "2.11 to 2.13", "transformers": "5.24"}

# SAELens's command line: flags to a runner config.
COMMAND_LINE = ("_parse_cfg_args",)
# Called by its trainers after each step: before they count it, and after.
TRAINERS = ("_checkpoint_if_needed", "_update_pbar")
# The parts of its loop over several SAEs that `SparseMultiSAETrainer` makes anew.
MULTI_TRAINER = ("_estimate_scaling_factors", "_is_logging_step", "_log_train_step")
# Called by SAELens's runner of several SAEs, and overridden by `SparseMultiSAETrainingRunner`.
MULTI_RUNNER = ("_run_with_interruption_handling", "_save_final_outputs")
# Where its store puts tokens; what the store keeps of several hooks, and whether it was read from.
STORE_MODULE = ("_get_input_token_device",)
STORE = ("_hook_names", "_hook_d_ins", "_hook_head_indices", "_dataloader")
# What a streaming dataset of `datasets` is made of. Without it, positions are found by reading.
EXAMPLES = "_ex_iterable"
# What SAELens's Matryoshka losses take from the SAE, and what the sparse SAE gives them.
MATRYOSHKA = ("_iterable_decode",)
# A module's parts, and PyTorch's registries of hooks: its public methods add to these and do not
# tell what is there.
MODULE_MEMBERS = ("_modules", "_parameters")
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
# Autograd's count of in-place changes; what makes a tensor whose values come later.
TENSOR = ("_version", "_make_wrapper_subclass")
TENSOR_SUBCLASSES = ("DisableTorchFunctionSubclass",)
# Which attention function a transformers model calls.
MODEL_CONFIG = ("_attn_implementation",)
# A product of float8 matrices into memory that is there. Its public form cannot do the latter.
SCALED_PRODUCT = ("_scaled_mm",)
# Whether a profiler runs, and what an operator takes.
PROFILER = ("_is_profiler_enabled",)
OPERATOR = ("_schema",)
# Arguments of `torch.optim.adam.adam`, the functional form of Adam.
FUNCTIONAL_ADAM = ("fused", "grad_scale")


def require(distribution: str, owner: str, names: Iterable[str], found: Iterable[str]) -> None:
    """
    Check that names are among those found.

    Raises:
        ImportError: with the first that is not, and the releases of the distribution that have it.
    """
    known = set(found)
    for name in names:
        if name not in known:
            raise ImportError(
                f"saelens_sparse needs {owner}.{name}, which {distribution} "
                f"{version(distribution)} does not have. It is tested with {distribution} "
                f"{TESTED[distribution]}: install that, or a newer saelens_sparse."
            )


def _check() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for distribution, owner, names, found in (
        (
            "sae-lens",
            "llm_sae_training_runner",
            COMMAND_LINE,
            dir(llm_sae_training_runner),
        ),
        ("sae-lens", "activations_store", STORE_MODULE, dir(activations_store)),
        ("sae-lens", "ActivationsStore", STORE, ActivationsStore.__annotations__),
        ("sae-lens", "SAETrainer", TRAINERS, dir(SAETrainer)),
        ("sae-lens", "MultiSAETrainer", (*TRAINERS, *MULTI_TRAINER), dir(MultiSAETrainer)),
        ("sae-lens", "MultiSAETrainingRunner", MULTI_RUNNER, dir(MultiSAETrainingRunner)),
        (
            "sae-lens",
            "MatryoshkaBatchTopKTrainingSAE",
            MATRYOSHKA,
            dir(MatryoshkaBatchTopKTrainingSAE),
        ),
        ("torch", "nn.Module", (*MODULE_HOOKS, *MODULE_MEMBERS), dir(torch.nn.Module())),
        ("torch", "Tensor", (*TENSOR, *TENSOR_HOOKS), dir(torch.Tensor)),
        ("torch", "optim.Optimizer", OPTIMIZER_HOOKS, dir(Adam([parameter]))),
        ("torch", "_C", TENSOR_SUBCLASSES, dir(torch._C)),  # pyright: ignore[reportPrivateUsage]
        ("transformers", "PretrainedConfig", MODEL_CONFIG, dir(PretrainedConfig())),
        ("torch", "torch", SCALED_PRODUCT, dir(torch)),
        ("torch", "autograd.profiler", PROFILER, dir(profiler)),
        ("torch", "ops.aten.mm.default", OPERATOR, dir(torch.ops.aten.mm.default)),
        ("torch", "optim.adam.adam()", FUNCTIONAL_ADAM, inspect.signature(adam).parameters),
    ):
        require(distribution, owner, names, found)


_check()

parse_cfg_args: Callable[[Sequence[str]], LanguageModelSAERunnerConfig[Any]] = getattr(
    llm_sae_training_runner, COMMAND_LINE[0]
)
input_token_device: Callable[[Any], torch.device] = getattr(activations_store, STORE_MODULE[0])
