"""What this package uses of SAELens and PyTorch that is not public: every such name, in one place.

A release may drop or change such a name without notice. Importing this module then fails with one
line that says which name is missing and which releases have it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_lens import LanguageModelSAERunnerConfig

# The releases that the test suite has been run with.
_TESTED = {"sae-lens": "6.54.12", "torch": "2.11 to 2.13"}


def _private(distribution: str, module: str, name: str) -> Any:
    try:
        return attrgetter(name)(import_module(module))
    except (ImportError, AttributeError):
        raise ImportError(
            f"saelens_sparse needs {module}.{name}, which {distribution} {version(distribution)} "
            f"does not have. It is tested with {distribution} {_TESTED[distribution]}: install "
            "that, or a newer saelens_sparse."
        ) from None


parse_cfg_args: Callable[[Sequence[str]], LanguageModelSAERunnerConfig[Any]] = _private(
    "sae-lens", "sae_lens.llm_sae_training_runner", "_parse_cfg_args"
)
"""SAELens's command line: flags to a runner config."""

for _name in ("_run_with_interruption_handling", "_save_final_outputs"):
    # SAELens's runner of several SAEs calls these, and `SparseMultiSAETrainingRunner` overrides
    # them.
    _private("sae-lens", "sae_lens.multi_sae_training_runner", f"MultiSAETrainingRunner.{_name}")
