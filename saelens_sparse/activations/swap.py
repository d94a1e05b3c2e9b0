"""The fast activation store in SAELens's own runners."""

from __future__ import annotations

from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse.activations.shards.match import check_shards
from saelens_sparse.activations.store import FastActivationsStore
from saelens_sparse.language_model import Option, check_option


def use_fast_activations_store(
    runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner,
    *,
    save_buffer: bool = True,
    language_model: Option = "auto",
    shards: str | None = None,
) -> FastActivationsStore:
    """
    Let a runner of SAELens's and its evaluator take activations from a `FastActivationsStore`.

    Call it before `runner.run()`. The batches are the same; see `FastActivationsStore`. With
    `prefetch_llm_batches`, a checkpoint of SAELens's runners leaves out the batches that its thread
    had ready. `SparseTrainingRunner` has none of this to do.

    Args:
        runner: One that has not run.
        save_buffer: Whether checkpoints hold the buffer. It takes 4 bytes an activation,
            1.5 GB for 164k x 2,304.
        language_model: What computes the activations. "auto" is fast, and gives SAELens's values
            up to rounding; "saelens" gives its bits. See `choose_model_path`.
        shards: Folder that `saelens-sparse cache` has written, in the place of the language model.

    Returns:
        The store.

    Raises:
        TypeError: its store is of another class than SAELens's.
        ValueError: its store has been read from, its settings cannot work, `language_model` is
            neither "auto" nor "saelens", or the cache is not whole or not of this run's.
    """
    if shards is not None:
        check_shards(runner.cfg, shards)
    return replace_store(
        runner, save_buffer=save_buffer, language_model=language_model, shards=shards
    )


def replace_store(
    runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner,
    *,
    save_buffer: bool,
    language_model: Option,
    shards: str | None = None,
) -> FastActivationsStore:
    """`use_fast_activations_store` for a cache that has been checked."""
    check_option(language_model, "language_model")
    store = runner.activations_store
    if type(store) not in (ActivationsStore, FastActivationsStore):
        raise TypeError(
            f"runner.activations_store is a {type(store).__name__}; allowed: SAELens's "
            "ActivationsStore"
        )
    own = FastActivationsStore.taking_over(store, shards)
    own.check()
    own.saves_buffer, own.language_model = save_buffer, language_model
    runner.activations_store = own
    if getattr(runner.evaluator, "activations_store", None) is store:
        runner.evaluator.activations_store = own
    return own
