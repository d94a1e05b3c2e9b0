"""`CacheRunner`: which activations it writes, and what an interruption leaves."""

import errno
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_sparse import FastActivationsStore, SparseMultiSAETrainingRunnerConfig
from saelens_sparse.activations.shards import writer as writer_module
from saelens_sparse.activations.shards.manifest import MANIFEST
from saelens_sparse.config.files import UsageError
from tests.support.activations import D_HEAD
from tests.support.cache import CACHED, Caches, contents, failing_at
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
OtherCaches = Callable[[str], Caches]
NAMES = ["tokens", "text with evals", "hooks"]
TOKENS = 160
FULL = OSError(errno.ENOSPC, "No space left on device")


def files(folder: Path) -> dict[str, Any]:
    """All but locks, times of modification, and the config, which names folders."""
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name != "verified.json"
    }
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["config"]
    return {**found, MANIFEST: manifest}


def uncached(caches: Caches, name: str, n_batches: int) -> list[torch.Tensor]:
    """Token ids and rows at each hook, as a run would get them without a cache."""
    runner = caches.runner(name)
    store = runner.new_store()
    assert isinstance(store, FastActivationsStore)
    batches = [store.model_batch_of_epoch() for _ in range(n_batches)]
    tokens = [batch.sequences.tokens.flatten() for batch in batches if batch and batch.sequences]
    parts = zip(*(batch.parts for batch in batches if batch is not None), strict=True)
    return [torch.cat(tokens).int(), *(torch.cat(part) for part in parts)]


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_holds_what_a_run_would_get(caches: Caches, name: str) -> None:
    expected = uncached(caches, name, 5)
    runner = caches.runner(name, tokens=5 * 32 - 7)
    assert runner.missing_bytes == 160 * runner.manifest.row_bytes
    manifest = runner.run()
    assert (manifest.rows, manifest.rows_written) == (160, 160)
    assert len(manifest.shards) > 1
    for found, wanted in zip(contents(runner.folder), expected, strict=True):
        assert torch.equal(found, wanted)
    assert runner.missing_bytes == 0


def test_positions_heads_and_excluded_tokens(caches: Caches) -> None:
    z = "blocks.1.attn.hook_z"
    options: dict[str, Any] = {"seqpos_slice": (1, 7, 2), "exclude_special_tokens": True}
    options |= {"hook_name": z, "hook_head_index": 1}
    cfg = caches.config("tokens", **options)
    cfg.sae = replace(cfg.sae, d_in=D_HEAD)
    runner = caches.runner("tokens", cfg=cfg, dtype="bfloat16", tokens=24)
    manifest = runner.run()
    assert [*manifest.hooks] == [(z, 1, D_HEAD)]
    tokens, rows = contents(runner.folder)
    store = runner.new_store()
    batch = store.model_batch_of_epoch()
    assert batch is not None
    assert batch.sequences is not None
    assert torch.equal(tokens[:12], batch.sequences.tokens[:, 1:7:2].flatten().int())
    assert torch.equal(rows[:12], batch.parts[0].bfloat16())


def test_a_dataset_that_ends_ends_the_cache(
    caches: Caches, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = caches.runner("tokens", tokens=10_000).run()
    assert manifest.is_complete
    assert (manifest.rows, manifest.rows_written) == (160, 160)
    assert "the dataset has ended: the cache has 160 tokens, not 10,016" in caplog.text
    assert caches.runner("tokens", tokens=10_000).manifest == manifest


@pytest.mark.parametrize("name", ["tokens", "text with evals", "hooks"])
def test_a_cache_that_is_stopped_at_any_shard_goes_on(
    other_caches: OtherCaches, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = other_caches("whole").runner(name, tokens=TOKENS)
    n_shards = len(whole.run().shards)
    expected = files(whole.folder)
    assert n_shards >= 3
    stopped = other_caches("stopped")
    finish = writer_module.ShardWriter.end_shard
    for n_done in range(n_shards):

        def ending(writer: Any, resume: str, n_done: int = n_done) -> None:
            finish(writer, resume)
            if len(writer.manifest.shards) >= n_done or writer.rows_added > 64 * n_done:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(writer_module.ShardWriter, "end_shard", ending)
        with pytest.raises(KeyboardInterrupt):
            stopped.runner(name, tokens=TOKENS).run()
        monkeypatch.undo()
    found = stopped.runner(name, tokens=TOKENS)
    assert 0 < len(found.manifest.shards) <= n_shards
    found.run()
    assert files(found.folder) == expected


@pytest.mark.parametrize("where", ["write", "sync", "manifest"])
def test_a_full_disk_loses_nothing_that_was_whole(
    other_caches: OtherCaches,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = other_caches("whole").runner("tokens", tokens=TOKENS)
    whole.run()
    expected = files(whole.folder)
    seam: dict[str, tuple[Any, str, int]] = {
        "write": (writer_module.OpenFile, "write", 7),
        "sync": (writer_module, "sync", 3),
        "manifest": (writer_module.Manifest, "write", 2),
    }
    owner, attribute, call = seam[where]
    stopped = other_caches("stopped")
    failing = failing_at(call, FULL, getattr(owner, attribute))
    monkeypatch.setattr(owner, attribute, partialmethod(failing) if where != "sync" else failing)
    runner = stopped.runner("tokens", tokens=TOKENS)
    with pytest.raises(OSError, match="No space left"):
        runner.run()
    assert 0 < len(runner.manifest.shards) < len(whole.manifest.shards)
    assert "the disk is full: " in caplog.text
    assert f"{runner.manifest.rows_written} of 160 tokens are whole" in caplog.text
    left = {path.name for path in runner.folder.glob("*.safetensors*")}
    assert left == {file.name for shard in runner.manifest.shards for file in shard.files}
    monkeypatch.undo()
    again = stopped.runner("tokens", tokens=TOKENS)
    assert again.manifest == runner.manifest
    again.run()
    assert files(again.folder) == expected


def test_the_disk_has_the_names_of_shards_before_the_manifest_lists_them(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(*paths: Path) -> None:
        seen.extend("folder" if path.is_dir() else "file" for path in paths)

    write = writer_module.Manifest.write
    monkeypatch.setattr(writer_module, "sync", spy)
    monkeypatch.setattr(
        writer_module.Manifest,
        "write",
        lambda manifest, folder: seen.append(f"{len(manifest.shards)}") or write(manifest, folder),
    )
    caches.runner("tokens", tokens=32).run()
    listed = seen.index("1")
    assert seen[listed - 1] == "folder"
    assert "file" in seen[:listed]


def test_too_little_room_is_said_before_anything_is_loaded(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage)
    with pytest.raises(ValueError, match=r"^cached_activations_path: .* room for 0\.0 GB"):
        caches.runner("tokens", override_model=None)
    assert not (caches.folder / "cache").exists()


class _Usage:
    free = 100


def test_what_a_killed_writer_left_makes_room(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "sync", failing_at(2, FULL, writer_module.sync))
        with pytest.raises(OSError, match="No space left"):
            caches.runner("tokens", tokens=TOKENS).run()
    left = caches.folder / "cache" / "00007.hook_0.safetensors.partial"
    left.write_bytes(bytes(TOKENS * 100))
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage)
    caches.runner("tokens", tokens=TOKENS)
    left.unlink()
    with pytest.raises(ValueError, match="has room for"):
        caches.runner("tokens", tokens=TOKENS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"config": {"seqpos_slice": (0, 4)}}, "seqpos_slice"),
        ({"config": {"context_size": 4}}, "context_size"),
        ({"config": {"model_name": "gpt2"}}, "model_name"),
        ({"config": {"prepend_bos": False}}, "prepend_bos"),
        ({"config": {"hook_name": "blocks.0.hook_resid_post"}}, "hooks"),
        ({"language_model": "auto"}, "language_model"),
    ],
)
def test_a_cache_of_something_else_is_left_alone(
    caches: Caches, options: dict[str, Any], named: str
) -> None:
    caches.runner("tokens", tokens=64).run()
    before = files(caches.folder / "cache")
    with pytest.raises(ValueError, match=rf"^cached_activations_path: .* another {named}\b"):
        caches.runner("tokens", tokens=64, **options)
    assert files(caches.folder / "cache") == before


def test_a_finished_cache_is_not_written_again(
    caches: Caches, caplog: pytest.LogCaptureFixture
) -> None:
    caches.runner("tokens", tokens=64).run()
    before = (caches.folder / "cache" / MANIFEST).stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        caches.runner("tokens", tokens=32, override_model=None).run()
    assert "is complete: 64 tokens" in caplog.text
    assert (caches.folder / "cache" / MANIFEST).stat().st_mtime_ns == before
    caches.runner("tokens", tokens=128)
    assert "64 tokens, fewer than the 128" in caplog.text


def test_what_another_runner_has_written_meanwhile_stays(caches: Caches) -> None:
    late, wider = caches.runner("tokens", tokens=64), caches.runner("tokens", tokens=96)
    caches.runner("tokens", tokens=64).run()
    before = files(caches.folder / "cache")
    assert late.run().rows == 64
    assert wider.run().rows == 64
    assert files(caches.folder / "cache") == before


def test_a_config_of_several_saes_that_trains_from_the_cache_writes_it(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = caches.config("hooks").to_dict() | CACHED | caches.options()
    cfg = SparseMultiSAETrainingRunnerConfig.from_dict(values)
    stopped = caches.runner("hooks", cfg=cfg, tokens=160)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "sync", failing_at(4, FULL, writer_module.sync))
        with pytest.raises(OSError, match="No space left"):
            stopped.run()
    assert stopped.manifest.shards
    assert caches.runner("hooks", cfg=cfg, tokens=160).run().rows == 160
    assert cfg.use_cached_activations


def test_a_folder_with_other_files_is_left_alone(caches: Caches) -> None:
    folder = caches.folder / "cache"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        caches.runner("tokens").run()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype: 'float64' cannot be used; allowed: float32, bfloat16"),
        ({"folder": "/proc/nothing"}, "cached_activations_path: '/proc/nothing'"),
        ({"language_model": "fast"}, "language_model"),
        ({"config": {"hook_name": "blocks.9.hook_mlp_out"}}, "the model has no hook"),
    ],
)
def test_bad_arguments_are_named(caches: Caches, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caches.runner("tokens", **options)
