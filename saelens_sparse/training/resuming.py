"""A checkpoint that this package's trainer loads, where SAELens's would need more memory."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any


class LaterResume:
    """
    Keeps SAELens's runner from loading a checkpoint whose moments are in bfloat16.

    PyTorch's Adam would hold them in float32 on the device before this package's takes over. Within
    a `with`, the runner's config names no checkpoint until `load` is called. Runs of SAEs with
    other moments resume as in SAELens.

    Args:
        runner: of one SAE or of several.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, self._cfg = runner, runner.cfg
        self._checkpoint: str | None = None

    def __enter__(self) -> LaterResume:
        runner = self._runner
        saes = [*runner.saes.values()] if hasattr(runner, "saes") else [runner.sae]
        if any(getattr(sae.cfg, "moments", None) is not None for sae in saes):
            self._checkpoint = self._cfg.resume_from_checkpoint
        if self._checkpoint is not None:
            runner.cfg = copy.copy(self._cfg)
            runner.cfg.resume_from_checkpoint = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.cfg = self._cfg

    def load(self, trainer: Any) -> None:
        """What SAELens's runner does to resume, if it was kept from it.

        Args:
            trainer: `SparseSAETrainer` or `SparseMultiSAETrainer`.
        """
        if self._checkpoint is None:
            return
        self._runner.cfg = self._cfg
        if hasattr(trainer, "trainers"):
            trainer.load_checkpoint(self._checkpoint)
        else:
            trainer.load_trainer_state(self._checkpoint)
            trainer.sae.load_weights_from_checkpoint(self._checkpoint)
        self._runner.activations_store.load_from_checkpoint(self._checkpoint)
