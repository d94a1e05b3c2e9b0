"""What SAELens's evals say about a trained SAE, and the pace of the language model."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

TIMED_MODEL_BATCHES = 2


def evaluate(runner: LanguageModelSAETrainingRunner, sae: TrainingSAE[Any]) -> dict[str, Any]:
    """
    Run SAELens's evals on `n_eval_batches` of the runner's text.

    Args:
        runner: Has trained, so that its text is at the same place on both sides.
        sae: Its normalization is folded into its weights.

    Returns:
        SAELens's metrics by name, `llm_tokens_per_second` (of the language model, where the
        training has read activations from a cache; else None) and `skipped`, which is None or says
        why there are no metrics. What is missing costs a reason, never the trained SAE.
    """
    cfg = runner.cfg
    if cfg.n_eval_batches == 0:
        return {"skipped": "n_eval_batches is 0"}
    if runner.activations_store.dataset is None:
        return {"skipped": "there is no text, only activations"}
    sae.eval()
    try:
        tokens_per_second = _language_model_pace(runner) if cfg.use_cached_activations else None
        metrics = _run_evals(runner, sae)
    except (RuntimeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        # The training is done and saved; SAELens's evals do not work for every model and hook.
        reason = str(error).strip().split("\n")[0]
        return {"skipped": f"SAELens's evals failed: {type(error).__name__}: {reason}"}
    return {"skipped": None, "llm_tokens_per_second": tokens_per_second, **metrics}


def _run_evals(
    runner: LanguageModelSAETrainingRunner, sae: TrainingSAE[Any]
) -> dict[str, float | None]:
    cfg, store = runner.cfg, runner.activations_store
    excluded = store.exclude_special_tokens
    groups, _ = run_evals(
        sae=sae,
        activation_store=store,
        model=runner.model,
        activation_scaler=ActivationScaler(),
        eval_config=EvalConfig(
            batch_size_prompts=cfg.eval_batch_size_prompts,
            n_eval_reconstruction_batches=cfg.n_eval_batches,
            n_eval_sparsity_variance_batches=cfg.n_eval_batches,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=False if excluded is None else excluded.tolist(),
        model_kwargs=cfg.model_kwargs,
        verbose=True,
    )
    metrics = {name: float(value) for group in groups.values() for name, value in group.items()}
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


@torch.no_grad()
def _language_model_pace(runner: LanguageModelSAETrainingRunner) -> float:
    """Tokens a second for which the model gives activations, the first batch left out."""
    store = runner.activations_store
    start, tokens = 0.0, 0
    for batch in range(1 + TIMED_MODEL_BATCHES):
        batch_tokens = store.get_batch_tokens()
        activations = store.get_activations(batch_tokens)
        if activations.is_cuda:
            torch.cuda.synchronize(activations.device)
        if batch == 0:
            start = time.perf_counter()
        else:
            tokens += batch_tokens[:, slice(*store.seqpos_slice)].numel()
    return tokens / (time.perf_counter() - start)
