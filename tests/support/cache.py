"""Caches in shards whose rows tell which rows they are, and runs that train from them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from saelens_sparse import FastActivationsStore
from saelens_sparse.activations.shards.manifest import Hook, Manifest, read_manifest
from saelens_sparse.activations.shards.writer import ShardWriter
from saelens_sparse.cache.runner import CacheRunner
from tests.support.activation_data import DATA
from tests.support.activation_runs import SCENARIOS, make_config
from tests.support.activations import Models

HOOKS = (Hook("a", None, 8), Hook("b", 1, 3))
WRITE_ROWS = 16  # at a time
CACHED = {"use_cached_activations": True}


def rows_of(hook: Hook, n_rows: int) -> torch.Tensor:
    """Row i begins with i."""
    generator = torch.Generator().manual_seed(hook.d_in)
    rows = torch.randn(n_rows, hook.d_in, generator=generator)
    rows[:, 0] = torch.arange(n_rows)
    return rows


def write_shards(
    folder: Path,
    n_rows: int,
    rows_per_shard: int,
    *,
    hooks: Sequence[Hook] = HOOKS,
    dtype: str = "float32",
) -> Manifest:
    """A cache of `rows_of` each hook. Row i's token id is i."""
    manifest = Manifest(tuple(hooks), dtype, n_rows, rows_per_shard, {}, {})
    writer = ShardWriter(folder, manifest)
    rows = [rows_of(hook, n_rows) for hook in hooks]
    for start in range(0, n_rows, WRITE_ROWS):
        end = min(n_rows, start + WRITE_ROWS)
        writer.add([part[start:end] for part in rows], torch.arange(start, end))
        if end % rows_per_shard == 0 or end == n_rows:
            writer.end_shard(str(end))
    return writer.complete()


def contents(folder: Path) -> list[torch.Tensor]:
    """All token ids, and all rows of each hook, in the order in which they were written."""
    manifest = read_manifest(folder)
    return [
        torch.cat([load_file(folder / s.files[i].name)[column.label] for s in manifest.shards])
        for i, column in enumerate(manifest.columns)
    ]


class Caches:
    """
    Writes caches of tiny models' activations, and makes stores that read them.

    Args:
        models: By name.
        folder: For all of it.
    """

    def __init__(self, models: Models, folder: Path) -> None:
        self.models, self.folder = models, folder

    def options(self, **options: Any) -> dict[str, Any]:
        return {"cached_activations_path": str(self.folder / "cache"), **options}

    def config(self, name: str, **options: Any) -> Any:
        """Of a scenario's run that takes activations from the cache."""
        scenario = SCENARIOS[name]
        if not scenario.hooks:
            options = CACHED | self.options(**options)
        return make_config(scenario, self.folder, **options)

    def data(self, name: str) -> Any:
        folder = self.folder / f"data of {name}"
        folder.mkdir(exist_ok=True)
        return DATA[SCENARIOS[name].data](folder)

    def runner(self, name: str, **options: Any) -> CacheRunner:
        """Options of `CacheRunner`; those of the config under "config", or all of it
        under "cfg".
        """
        cfg = options.pop("cfg", None) or self.config(name, **options.pop("config", {}))
        options = {
            "folder": self.folder / "cache",
            "shard_bytes": 3000,
            "override_dataset": self.data(name),
            "override_model": self.models["float32"],
            "language_model": "saelens",
            **options,
        }
        return CacheRunner(cfg, **options)

    def store(self, name: str, **options: Any) -> FastActivationsStore:
        """Of one hook, that reads the cache."""
        cfg = self.config(name, **options)
        cfg.use_cached_activations = False
        stock = ActivationsStore.from_config(self.models["float32"], cfg, self.data(name))
        cache = str(cfg.cached_activations_path)
        return FastActivationsStore.taking_over(stock, cache)


def batches_of(store: Iterator[torch.Tensor], n: int) -> list[torch.Tensor]:
    return [next(store).clone() for _ in range(n)]


Failing = Callable[..., Any]


def failing_at(call: int, error: BaseException, function: Callable[..., Any]) -> Failing:
    """Like a function, but raises at its `call`-th call, counted from 0."""
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error
        return function(*args, **kwargs)

    return failing
