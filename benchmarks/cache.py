"""
Caches of activations: writing one, reading it and SAELens's, and training from it.

Activations are ready on the device, and have the traits of real ones. Everything happens in one
folder, in one process. What was written is compared with its source. Batches of SAELens's format
are compared with those of SAELens's store. Both come before the timing of what reads.

Beside writing stand the disk's own speed, for synced files of the same size, and a model's.
Beside reading stands the disk's own speed, once the page cache has dropped the files
(`posix_fadvise`). Beside training stand the SAE's steps on batches that are on the device.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from typing_extensions import override

from benchmarks.cache_cases import CacheCase
from benchmarks.cases import TOPK
from benchmarks.floors import time_steps
from benchmarks.harness import describe, say
from benchmarks.random_data import cached_activations, token_dataset
from benchmarks.rows import DisagreementError, ResultsFile, Row
from benchmarks.store import (
    HOOK,
    STORES,
    VOCABULARY,
    FreeModel,
    StoreCase,
    first_batches,
    make_store,
    one_epoch,
    require_same_batches,
    take,
)
from benchmarks.wall_clock import PER_TOKENS, now
from saelens_sparse import FastActivationsStore, SparseTrainingRunner
from saelens_sparse.activations.shards.check import check_files
from saelens_sparse.activations.shards.manifest import DTYPE_NAMES, Hook, Manifest
from saelens_sparse.activations.shards.match import settings_of
from saelens_sparse.activations.shards.writer import ShardWriter
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.cache.runner import CacheRunner
from saelens_sparse.profile.data import ActivationStream
from saelens_sparse.profile.trainers import release_memory

READY_BATCHES = 8
FEATURES_PER_ROW = 64
PARTS = ("write", "read", "saelens", "train", "model")
_READ_BYTES = 2**24
_THREADS = 4


class CacheSession:
    """
    What all measurements of a case share.

    Args:
        case: Sizes.
        folder: On the disk that is measured.
        device: "cuda" or "cpu".
        rounds: Timed windows of a training.
    """

    def __init__(self, case: CacheCase, folder: Path, device: str, rounds: int):
        self.case, self.folder, self.device, self.rounds = case, folder, device, rounds
        self.cache = folder / f"cache_{case.name}"
        self.cfg = self.runner_config()
        stream = ActivationStream(case.d_in, 8192, FEATURES_PER_ROW, device)
        ready = [stream.batch(case.model_rows, index) for index in range(READY_BATCHES)]
        for index, batch in enumerate(ready):  # each row says which one it is; exact in 8 bits
            number = torch.arange(index * case.model_rows, (index + 1) * case.model_rows)
            batch[:, :3] = torch.stack([number >> 16, number >> 8 & 255, number & 255], 1).float()
        self.source = torch.cat(ready)
        row_bytes = case.d_in * DTYPE_NAMES[case.dtype].itemsize
        self.batch_bytes = case.batch * row_bytes
        self.n_bytes = case.rows * row_bytes

    def runner_config(self, **options: Any) -> LanguageModelSAERunnerConfig[Any]:
        case = self.case
        kind: Any = ARCHITECTURES[TOPK].config
        sae = kind(d_in=case.d_in, d_sae=case.d_sae, k=case.k, device=self.device)
        settings: dict[str, Any] = {
            "model_name": case.name,
            "hook_name": HOOK,
            "dataset_path": "random tokens",
            "streaming": False,
            "context_size": case.context,
            "n_batches_in_buffer": case.buffer_prompts,
            "store_batch_size_prompts": case.model_prompts,
            "train_batch_size_tokens": case.batch,
            "training_tokens": (1 + self.rounds) * case.window * case.batch,
            "device": self.device,
            "autocast": self.device == "cuda",
            "logger": LoggingConfig(log_to_wandb=False),
            "checkpoint_path": None,
            "output_path": None,
            "verbose": False,
            "use_cached_activations": True,
            "cached_activations_path": str(self.cache),
            **options,
        }
        return LanguageModelSAERunnerConfig(sae=sae, **settings)

    def store_case(self, **options: Any) -> StoreCase:
        case = self.case
        return StoreCase(
            case.name, case.d_in, case.context, case.buffer_prompts, case.model_prompts,
            case.batch, cached=True, **options,
        )  # fmt: skip

    def rate(self, contender: str, n_bytes: float, seconds: float, **more: Any) -> Row:
        """A row of a speed, with the time of a training batch's bytes at that speed."""
        ms = 1e3 * seconds * self.batch_bytes / n_bytes * PER_TOKENS / self.case.batch
        speed = {"gb_s": n_bytes / seconds / 1e9, "bytes": round(n_bytes)}
        return {"contender": contender, "ms": ms, **speed, **more}

    # Writing

    def write(self) -> Iterator[Row]:
        """Write the cache; the same bytes without a format, before and after."""
        before = self._disk_write()
        begin = time.perf_counter()
        manifest = self._write_shards()
        seconds = time.perf_counter() - begin
        self._check_shards(manifest)
        after = self._disk_write()
        yield self.rate("disk_write", self.n_bytes, min(before, after), ms_max=max(before, after))
        yield self.rate("write", self.n_bytes, seconds)
        begin = time.perf_counter()
        n_bytes = check_files(self.cache, manifest, hash_all=True)
        yield self.rate("verify", n_bytes, time.perf_counter() - begin)

    def _disk_write(self) -> float:
        """Seconds to write as many bytes in files of the same size."""
        block = self.source[: self.case.model_rows].to(DTYPE_NAMES[self.case.dtype])
        content = block.cpu().view(torch.uint8).numpy().data.cast("B")
        paths: list[Path] = []
        begin = time.perf_counter()
        with ThreadPoolExecutor(1) as syncing:  # as the writer does: the next file meanwhile
            left, jobs = self.n_bytes, []
            while left > 0:
                path = self.folder / f"raw_{len(paths)}"
                paths.append(path)
                file = path.open("wb", buffering=0)
                size = min(left, self.case.shard_bytes)
                left -= size
                while size > 0:
                    size -= file.write(content[: min(size, len(content))])
                jobs.append(syncing.submit(_sync_and_close, file))
            for job in jobs:
                job.result()
        seconds = time.perf_counter() - begin
        for path in paths:
            path.unlink()
        return seconds

    def _write_shards(self) -> Manifest:
        case = self.case
        per_shard = -(-case.shard_bytes // (self.n_bytes // case.rows) // case.model_rows)
        hooks = (Hook(HOOK, None, case.d_in),)
        settings, rows = settings_of(self.cfg), per_shard * case.model_rows
        writer = ShardWriter(self.cache, Manifest(hooks, case.dtype, case.rows, rows, settings, {}))
        n = case.model_rows
        for start in range(0, case.rows, n):
            place = start % len(self.source)
            numbers = torch.arange(place, place + n)
            writer.add([self.source[place : place + n]], numbers)
            if writer.rows_of_shard == rows or start + n == case.rows:
                writer.end_shard("")
        return writer.complete()

    def _check_shards(self, manifest: Manifest) -> None:
        """
        Raises:
            DisagreementError: The first or the last shard is not the source.
        """
        for number in (0, len(manifest.shards) - 1):
            shard = manifest.shards[number]
            tokens, rows = (load_file(self.cache / file.name) for file in shard.files)
            found, numbers = rows["hook_0"], tokens["tokens"].long()
            for start in range(0, shard.rows, self.case.model_rows):
                part = slice(start, start + self.case.model_rows)
                self._require_source(found[part], numbers[part])

    def _require_source(self, found: torch.Tensor, numbers: torch.Tensor) -> None:
        dtype = DTYPE_NAMES[self.case.dtype]
        expected = self.source[numbers.to(self.source.device)].to(dtype)
        if not torch.equal(expected, found.to(expected.device, dtype)):
            raise DisagreementError("rows of the cache are not those that were written")

    def model(self) -> Iterator[Row]:
        """The language model alone, and a cache that it fills."""
        case, folder = self.case, self.folder / "of_model"
        model = case.shape.make("TL", torch.bfloat16, self.device)
        n_tokens = case.n_batches * case.batch
        tokens = token_dataset(
            self.folder, 2 * n_tokens // case.context + 64, case.context, case.shape.vocabulary
        )
        cfg = self.runner_config(hook_name=case.shape.hook_name("TL"))
        cfg.sae.d_in = case.shape.d_model
        bytes_of_token = case.shape.d_model * DTYPE_NAMES[case.dtype].itemsize
        runner = CacheRunner(
            cfg, folder, dtype=case.dtype, tokens=n_tokens, shard_bytes=case.shard_bytes // 8,
            override_dataset=tokens, override_model=model,
        )  # fmt: skip
        runner.run()  # a warm-up
        store = runner.new_store()
        for n_batches in (2, -(-n_tokens // case.model_rows)):
            begin = now(self.device)
            for _ in range(n_batches):
                store.model_batch_of_epoch()
            seconds = now(self.device) - begin
        n_tokens = runner.manifest.rows
        yield self.rate("model", n_tokens * bytes_of_token, seconds)
        writer = ShardWriter(self.folder / "of_model_again", replace(runner.manifest, shards=()))
        begin = now(self.device)
        _fill(writer, store, n_tokens)
        seconds = now(self.device) - begin
        yield self.rate("write_from_model", n_tokens * bytes_of_token, seconds)

    # Reading

    def read(self) -> Iterator[Row]:
        """Read the cache from the page cache, and from the disk."""
        for contender in ("read", "read_cold"):
            store = self._store()
            if contender == "read":
                self._read_raw()
                self._check_batches(store)
            else:
                self._drop()
            begin = now(self.device)
            take(store, self.case.n_batches, self.device)
            seconds = now(self.device) - begin
            # The first fill of the buffer gives rows that were not served.
            rows = self.case.n_batches * self.case.batch
            rows += (contender == "read_cold") * self._unserved()
            n_bytes = rows * self.batch_bytes / self.case.batch
            yield self.rate(contender, n_bytes, seconds)
            del store
        self._drop()
        yield self.rate("disk_read", *self._read_raw())
        yield self.rate("memory_read", *self._read_raw())

    def _unserved(self) -> int:
        return self.case.buffer_prompts * self.case.context // 2

    def _store(self) -> FastActivationsStore:
        model = FreeModel(self.store_case(), self.device, by_token=False)
        store = make_store(FastActivationsStore, self.store_case(), model, self.cache)
        assert isinstance(store, FastActivationsStore)
        return store

    def _check_batches(self, store: FastActivationsStore) -> None:
        for batch in first_batches(store, max(2, self.case.n_batches // 10)):
            parts = batch[:, :3].long()
            numbers = (parts[:, 0] << 16) + (parts[:, 1] << 8) + parts[:, 2]
            self._require_source(batch, numbers)

    def _files(self) -> list[Path]:
        return sorted(self.cache.glob("*.hook_0.safetensors"))

    def _drop(self) -> None:
        """Let the page cache forget the files."""
        for path in self.cache.glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def _read_raw(self) -> tuple[int, float]:
        """Bytes and seconds to read all files from their beginnings, by some threads at once."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(_THREADS) as threads:
            n_bytes = sum(threads.map(_read_file, self._files()))
        return n_bytes, time.perf_counter() - begin

    def saelens(self) -> Iterator[Row]:
        """SAELens's format by its own store and by this package's: the first pass and the next."""
        case = self.case
        sizes = (case.saelens_prompts, case.context, case.d_in, VOCABULARY)
        data = cached_activations(self.folder, *sizes, HOOK)
        store_case = replace(self.store_case(), buffer_prompts=case.saelens_prompts // 8)
        model = FreeModel(store_case, self.device, by_token=False)

        def fresh(kind: type[ActivationsStore]) -> ActivationsStore:
            return make_store(kind, store_case, model, data)

        n_checked = max(2, 2 * store_case.refill_batches)
        stock, fast = (fresh(kind) for kind in STORES.values())
        require_same_batches(list(first_batches(stock, n_checked)), first_batches(fast, n_checked))
        del stock, fast
        warnings.filterwarnings("ignore", message="All samples in the training dataset")
        in_buffer = store_case.buffer_prompts * case.context
        n_batches = (case.saelens_prompts * case.context - in_buffer) // case.batch
        batch_bytes = case.batch * case.d_in * torch.float32.itemsize
        scale = self.batch_bytes / batch_bytes
        for name, kind in STORES.items():
            store = fresh(kind)
            for turn in ("first", "second"):
                begin = now(self.device)
                take(store, n_batches, self.device)
                seconds = now(self.device) - begin
                # In the first pass the buffer is filled, too.
                n = n_batches + (turn == "first") * in_buffer // 2 // case.batch
                row = self.rate(f"saelens_format_{name}_{turn}", n * batch_bytes, seconds)
                yield {**row, "ms": row["ms"] / scale, "checked_batches": n_checked}
            del store

    # Training

    def train(self) -> Iterator[Row]:
        """The SAE's steps alone, and training from the cache: in the page cache, and not."""
        case = self.case
        model = FreeModel(self.store_case(), self.device, by_token=False)
        tokens = token_dataset(self.folder, 2 * case.buffer_prompts, case.context, VOCABULARY)
        common: Row = {"batch": case.batch, "d_sae": case.d_sae, "k": case.k}
        for contender in ("train", "train_cold"):
            torch.manual_seed(0)
            runner = MarkedRunner(self.cfg, override_dataset=tokens, override_model=model)
            store = runner.activations_store
            assert isinstance(store, MarkedStore)
            store.window = case.window
            if contender == "train":
                self._read_raw()
            else:
                self._drop()
            runner.run()
            assert runner.trainer is not None
            marks = [*store.marks[1:], now(self.device)]
            scale = 1e3 * PER_TOKENS / case.batch / case.window
            ms = [scale * (end - begin) for begin, end in pairwise(marks)]
            if contender == "train":
                step_ms = time_steps(runner.trainer, store, 2 * case.window, self.device)
                yield {"contender": "step", "ms": step_ms, **common}
            times = {"ms": median(ms), "ms_min": min(ms), "ms_max": max(ms)}
            yield {"contender": contender, **times, **common}
            del runner, store
            release_memory(self.device)


class MarkedStore(FastActivationsStore):
    """Notes the time when every `window`-th batch is asked for."""

    window = 1
    given = 0

    @override
    def __next__(self) -> torch.Tensor:
        if self.given % self.window == 0:
            self.marks = [*getattr(self, "marks", []), now(self.device.type)]
        self.given += 1
        return super().__next__()


class MarkedRunner(SparseTrainingRunner):
    """`SparseTrainingRunner` with a `MarkedStore`."""

    @override
    def prepare_store(self) -> None:
        super().prepare_store()
        shards = self.cfg.cached_activations_path
        self.activations_store = MarkedStore.taking_over(self.activations_store, shards)


def _fill(writer: ShardWriter, store: FastActivationsStore, n_tokens: int) -> None:
    """As `CacheRunner.run` does, with a language model that is warm."""
    while writer.rows_added < n_tokens:
        batch = store.model_batch_of_epoch()
        assert batch is not None
        assert batch.sequences is not None
        writer.add(batch.parts, batch.sequences.tokens.flatten())
        if writer.rows_of_shard == writer.manifest.rows_per_shard:
            writer.end_shard("")
    if writer.rows_of_shard:
        writer.end_shard("")
    writer.complete()


def _sync_and_close(file: Any) -> None:
    os.fsync(file.fileno())
    file.close()


def _read_file(path: Path) -> int:
    memory, total = bytearray(_READ_BYTES), 0
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(memory):
            total += n
    return total


def run(
    results: ResultsFile, cases: Iterable[CacheCase], parts: Sequence[str], args: Namespace
) -> int:
    """
    Measure cases; returns 1 if any part could not be measured.

    Args:
        results: Where rows go.
        cases: What to measure.
        parts: Those of `PARTS` that are wanted. "read" and "train" need "write" once.
        args: The options `device`, `rounds` and `cache`.
    """
    with tempfile.TemporaryDirectory() as temporary, one_epoch():
        for case in cases:
            session = CacheSession(case, args.cache or Path(temporary), args.device, args.rounds)
            key: Row = {"operation": "cache", "case": case.name}
            shape = asdict(case)
            key |= {name: shape[name] for name in ("d_in", "context", "dtype", "model_prompts")}
            for part in [part for part in PARTS if part in parts]:
                measure: Callable[[], Iterator[Row]] = getattr(session, part)
                begin = time.perf_counter()
                try:
                    rows = [{"status": "ok", **row} for row in measure()]
                except Exception as error:
                    rows = [{"contender": part, **describe(error)}]
                for row in rows:
                    results.append({**key, **row})
                    say(f"{case.name} {row['contender']}: {_said(row)}")
                say(f"{case.name} {part} took {time.perf_counter() - begin:.0f} s")
                release_memory(args.device)
    return int(any(row["status"] != "ok" for row in results.rows))


def _said(row: Row) -> str:
    if row["status"] != "ok":
        return row["message"]
    speed = f", {row['gb_s']:.2f} GB/s" if "gb_s" in row else ""
    return f"{row['ms']:.3f} ms by {PER_TOKENS} tokens{speed}"
