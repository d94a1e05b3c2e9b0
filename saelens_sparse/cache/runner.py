"""Writes a run's activations to a cache, once."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, logger
from sae_lens.load_model import load_model
from safetensors.torch import load, save
from tqdm.auto import tqdm

from saelens_sparse.activations.before_loading import check_activations
from saelens_sparse.activations.shards.check import check_files
from saelens_sparse.activations.shards.manifest import (
    DTYPE_NAMES,
    MANIFEST,
    Manifest,
    is_sharded,
    read_manifest,
)
from saelens_sparse.activations.shards.match import (
    Config,
    differing,
    hooks_of_config,
    settings_of,
)
from saelens_sparse.activations.shards.writer import ShardWriter, unlisted_files
from saelens_sparse.activations.store import FastActivationsStore
from saelens_sparse.config.messages import shown
from saelens_sparse.config.outputs import check_writable
from saelens_sparse.config.several import SparseMultiSAETrainingRunnerConfig
from saelens_sparse.language_model import Option, check_option
from saelens_sparse.reports.files import enter_output_folder
from saelens_sparse.training.interruption import StopSignals

GB = 1e9
# A shard is what an interruption loses, and a file for each hook: at least this size, and at most
# this many of them.
MIN_SHARD_BYTES, MAX_SHARDS = 2**30, 200


class CacheRunner:
    """
    Writes the activations that a runner's config asks for to a folder, from which runs train.

    The tokens are those that training would take, in its order. None is left out:
    `exclude_special_tokens` counts when a run reads. Batches of the language model are whole, so
    that the number of tokens is rounded up.

    What is written is safe shard by shard. A new runner with the same arguments goes on after the
    last whole one.

    Args:
        cfg: Of a runner. `cached_activations_path` is the folder, unless another one is given.
        folder: Another one.
        dtype: "float32", "bfloat16" or "float16"; None for the config's.
        tokens: How many; None for the config's `training_tokens`.
        shard_bytes: Size of a shard; None for 1 GiB, or more where that would make over 200.
        override_dataset: In the place of the config's.
        override_model: In the place of the config's.
        language_model: "auto" or "saelens", as for `SparseTrainingRunner`.

    Attributes:
        folder: of the cache.
        manifest: of what is whole on the disk.

    Raises:
        ValueError: the arguments cannot work, the folder holds something else, or the disk has no
            room. Nothing has been loaded then.
    """

    def __init__(
        self,
        cfg: Config,
        folder: str | Path | None = None,
        *,
        dtype: str | None = None,
        tokens: int | None = None,
        shard_bytes: int | None = None,
        override_dataset: Any = None,
        override_model: Any = None,
        language_model: Option = "auto",
    ) -> None:
        check_option(language_model, "language_model")
        path = folder or getattr(cfg, "cached_activations_path", None)
        if not path:
            raise ValueError("cached_activations_path: name a folder for the cache")
        self.folder = Path(path)
        self._language_model: Option = language_model
        self._dataset, self._model = override_dataset, override_model
        self._cfg = copy.copy(cfg)
        self._cfg.exclude_special_tokens = False
        if isinstance(self._cfg, LanguageModelSAERunnerConfig | SparseMultiSAETrainingRunnerConfig):
            self._cfg.use_cached_activations = False  # they are what is to be made
        self._positions = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
        self._batch_rows = cfg.store_batch_size_prompts * self._positions
        self._cfg.training_tokens = self._whole_batches(tokens or cfg.training_tokens)
        wanted = self._wanted(cfg, dtype or str(cfg.dtype), shard_bytes, language_model)
        self.manifest = self._found(wanted, shard_bytes) if is_sharded(self.folder) else wanted
        if not self.manifest.is_complete:
            check_activations(self._cfg, override_dataset, override_model)
            self._check_room()

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        missing = self.manifest.rows - self.manifest.rows_written
        return 0 if self.manifest.is_complete else missing * self.manifest.row_bytes

    def run(self) -> Manifest:
        """
        Write what is missing.

        Returns:
            The manifest of the whole cache. It has fewer tokens if the dataset has ended.

        Raises:
            UsageError: another process writes to the folder, or it holds other files.
            OSError: the disk is full, or cannot be written to. What was whole stays.
            ValueError: float16 cannot hold an activation.
            KeyboardInterrupt: by SIGINT or SIGTERM. What was whole stays.
        """
        if self.manifest.is_complete:
            logger.info("%s is complete: %s tokens", self.folder, f"{self.manifest.rows:,}")
            return self.manifest
        with enter_output_folder(self.folder, MANIFEST), StopSignals() as signals:
            if is_sharded(self.folder):  # another runner may have written there since
                self.manifest = self._found(self.manifest, None)
            if not self.manifest.is_complete:
                self._write_missing(signals)
        return self.manifest

    def _write_missing(self, signals: StopSignals) -> None:
        self.manifest.write(self.folder)
        check_files(self.folder, self.manifest)
        store = self.new_store()
        if self.manifest.resume:
            store.go_to(load(b64decode(self.manifest.resume)))
        writer = ShardWriter(self.folder, self.manifest)
        try:
            self._write(writer, store, signals)
            with signals.held():
                self.manifest = writer.complete()
        except BaseException as error:
            with signals.held():
                self.manifest = writer.abandon()
            self._say_what_is_left(error)
            raise

    def _write(
        self, writer: ShardWriter, store: FastActivationsStore, signals: StopSignals
    ) -> None:
        total = self.manifest.rows
        title = f"caching {total * self.manifest.row_bytes / GB:.1f} GB"
        bar = tqdm(total=total, initial=writer.rows_added, unit="tok", unit_scale=True, desc=title)
        with bar:
            while writer.rows_added < total:
                signals.begin_step()
                batch = store.model_batch_of_epoch()
                if batch is None:
                    signals.end_step()
                    break
                assert batch.sequences is not None
                tokens = batch.sequences.tokens[:, slice(*store.seqpos_slice)].flatten()
                writer.add(batch.parts, tokens)
                if writer.rows_of_shard == self.manifest.rows_per_shard:
                    writer.end_shard(_encoded(store))
                bar.update(len(tokens))
                signals.end_step()
        if writer.rows_of_shard:
            writer.end_shard(_encoded(store))
        if writer.rows_added < total:
            logger.warning(
                "the dataset has ended: the cache has %s tokens, not %s",
                f"{writer.rows_added:,}",
                f"{total:,}",
            )

    def _wanted(
        self, cfg: Config, dtype: str, shard_bytes: int | None, language_model: Option
    ) -> Manifest:
        dtype = dtype.removeprefix("torch.")
        if dtype not in DTYPE_NAMES:
            allowed = ", ".join(DTYPE_NAMES)
            raise ValueError(f"dtype: {shown(dtype)} cannot be used; allowed: {allowed}")
        settings = settings_of(self._cfg) | {"language_model": language_model}
        config = json.loads(json.dumps(cfg.to_dict(), default=str))
        rows = self._cfg.training_tokens
        manifest = Manifest(tuple(hooks_of_config(cfg)), dtype, rows, 0, settings, config)
        total = rows * manifest.row_bytes
        n_bytes = shard_bytes or max(MIN_SHARD_BYTES, total // MAX_SHARDS)
        per_shard = self._whole_batches(n_bytes // manifest.row_bytes)
        return Manifest(manifest.hooks, dtype, rows, per_shard, settings, config)

    def _found(self, wanted: Manifest, shard_bytes: int | None) -> Manifest:
        """The manifest that is there, if it is of the same activations."""
        try:
            found = read_manifest(self.folder)
        except ValueError as error:
            raise ValueError(f"cached_activations_path: {error}") from error
        compared = ["hooks", "dtype"]
        if not found.is_complete:
            compared += ["rows", *["rows_per_shard"] * (shard_bytes is not None)]
        other = differing(wanted.settings, found.settings)
        other += [name for name in compared if getattr(wanted, name) != getattr(found, name)]
        if found.is_complete and found.rows < wanted.rows and not other:
            logger.warning(
                "the cache has %s tokens, fewer than the %s that are asked for",
                f"{found.rows:,}",
                f"{wanted.rows:,}",
            )
        if other:
            raise ValueError(
                f"cached_activations_path: {shown(str(self.folder))} holds a cache with another "
                f"{', '.join(other)}; name another folder"
            )
        return found

    def _whole_batches(self, rows: int) -> int:
        return max(1, -(-rows // self._batch_rows)) * self._batch_rows

    def _check_room(self) -> None:
        check_writable("cached_activations_path", self.folder, 0)
        folder = self.folder.absolute()
        while not folder.exists():
            folder = folder.parent
        free, missing = shutil.disk_usage(folder).free, self.missing_bytes
        free += sum(path.stat().st_size for path in unlisted_files(self.folder, self.manifest))
        if free < missing:
            raise ValueError(
                f"cached_activations_path: {shown(str(self.folder))} has room for "
                f"{free / GB:.1f} GB; the cache needs {missing / GB:.1f} GB more"
            )

    def _say_what_is_left(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            full = errno.ENOSPC, errno.EDQUOT
            why = "the disk is full" if error.errno in full else error.strerror or str(error)
        elif isinstance(error, KeyboardInterrupt):
            why = "stopped"
        else:
            return
        logger.warning(
            "%s: %s of %s tokens are whole in %s, %.1f GB are missing; the same command goes on",
            why,
            f"{self.manifest.rows_written:,}",
            f"{self.manifest.rows:,}",
            self.folder,
            self.missing_bytes / GB,
        )

    def new_store(self) -> FastActivationsStore:
        """The store whose activations are written; loads the language model."""
        cfg = self._cfg
        hooks = hooks_of_config(cfg)
        model = self._model
        if model is None:
            model = load_model(
                cfg.model_class_name,
                cfg.model_name,
                device=cfg.llm_device,
                model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
                hook_names=[hook.name for hook in hooks],
            )
        if cfg.compile_llm:  # as SAELens's runner does
            compiled = torch.compile(model.run_with_cache, mode=cfg.llm_compilation_mode)
            model.run_with_cache = compiled
        if isinstance(cfg, LanguageModelSAERunnerConfig):
            store = FastActivationsStore.from_config(model, cfg, self._dataset)
        else:
            store = FastActivationsStore.from_config_multi_hook(
                model,
                dataset=self._dataset or cfg.dataset_path,
                hook_names=[hook.name for hook in hooks],
                hook_d_ins={hook.name: hook.d_in for hook in hooks},
                hook_head_indices={hook.name: hook.head_index for hook in hooks},
                total_training_tokens=cfg.training_tokens,
                device=cfg.act_store_device or cfg.device,
                **{name: getattr(cfg, name) for name in _OF_MULTI_STORE},
            )
        assert isinstance(store, FastActivationsStore)
        store.language_model = self._language_model
        return store


# Arguments of SAELens's store that have the names of the config's fields.
_OF_MULTI_STORE = (
    "streaming",
    "context_size",
    "n_batches_in_buffer",
    "store_batch_size_prompts",
    "train_batch_size_tokens",
    "prepend_bos",
    "dtype",
    "model_kwargs",
    "autocast_lm",
    "dataset_trust_remote_code",
    "seqpos_slice",
    "disable_concat_sequences",
    "sequence_separator_token",
    "activations_mixing_fraction",
    "use_chat_formatting",
)


def _encoded(store: FastActivationsStore) -> str:
    return b64encode(save(store.position())).decode()
