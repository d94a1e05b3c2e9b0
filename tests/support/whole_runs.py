"""Records of runs that nobody has run."""

from typing import Any

from saelens_sparse.whole_run.record import SPARSE_RUNNER, RunRecord
from saelens_sparse.whole_run.windows import EVALS, LOGGING, MODEL, REST, STEP, STORE

CONFIG: dict[str, Any] = {
    "device": "cuda",
    "llm_device": "cuda",
    "prefetch_llm_batches": False,
    "use_cached_activations": False,
    "logger": {"wandb_log_frequency": 10, "eval_every_n_wandb_logs": 100},
}


def record(
    model: float = 20.0,
    step: float = 70.0,
    store: float = 8.0,
    evals: float = 0.0,
    logging: float = 0.0,
    **more: Any,
) -> RunRecord:
    """Of these milliseconds by part, and 2 ms for the rest of the loop."""
    parts = {MODEL: model, STORE: store, STEP: step, EVALS: evals, LOGGING: logging, REST: 2.0}
    whole = sum(parts.values())
    values: dict[str, Any] = {
        "architecture": "topk_sparse",
        "runner": SPARSE_RUNNER,
        "batch": 4096,
        "steps": 80,
        "parts_ms": parts,
        "ms_min": 0.9 * whole,
        "ms_max": 1.1 * whole,
        "eval_seconds": evals if evals else None,
        "steps_between_evals": 1000 if evals else None,
        "busy_share": 0.9,
        "model_path": "fast",
        "model_reason": "its architecture is known",
        "whole_fillings": True,
        "l0": 32.0,
    }
    return RunRecord.model_validate(values | more)
