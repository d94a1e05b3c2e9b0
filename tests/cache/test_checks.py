"""A cache that a run cannot use is refused in one line, before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAETrainingRunner

from saelens_sparse import SparseTrainingRunner, use_fast_activations_store
from saelens_sparse.activations.shards import check as check_module
from saelens_sparse.activations.shards.check import VERIFIED, check_files
from saelens_sparse.activations.shards.manifest import HEADER_BYTES, MANIFEST, read_manifest
from saelens_sparse.activations.shards.match import check_shards
from tests.support.cache import Caches
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say


@pytest.fixture
def cache(caches: Caches) -> Path:
    """A whole cache of the scenario "tokens"."""
    runner = caches.runner("tokens", tokens=160, dtype="float16")
    runner.run()
    return runner.folder


def rows_file(cache: Path) -> Path:
    return cache / read_manifest(cache).shards[1].files[1].name


def cut_off(cache: Path) -> None:
    os.truncate(rows_file(cache), rows_file(cache).stat().st_size - 1)


def altered(cache: Path) -> None:
    with rows_file(cache).open("r+b") as file:
        file.seek(HEADER_BYTES + 100)
        byte = file.read(1)
        file.seek(HEADER_BYTES + 100)
        file.write(bytes([byte[0] ^ 1]))


def with_another_header(cache: Path) -> None:
    with rows_file(cache).open("r+b") as file:
        content = file.read(HEADER_BYTES).replace(b"F16", b"I16")
        file.seek(0)
        file.write(content)


def missing(cache: Path) -> None:
    rows_file(cache).unlink()


def unfinished(cache: Path) -> None:
    content = json.loads((cache / MANIFEST).read_text())
    (cache / MANIFEST).write_text(json.dumps(content | {"is_complete": False}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, r"00001\.hook_0\.safetensors' has \d+ bytes in place of \d+"),
        (altered, r"00001\.hook_0\.safetensors' was altered"),
        (with_another_header, "has another header"),
        (missing, "cannot be read: No such file"),
        (unfinished, "it has 160 of 160 tokens; the command that writes it goes on"),
    ],
)
def test_a_damaged_cache_is_refused(caches: Caches, cache: Path, damage: Any, reason: str) -> None:
    damage(cache)
    cfg = caches.config("tokens", model_name="gelu-2l")
    message = rf"^cached_activations_path: .*cannot be used: .*{reason}"
    with pytest.raises(ValueError, match=message) as error:
        SparseTrainingRunner(cfg)  # which would load a model
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_name": "gpt2"}, "it is of model_name 'gelu-2l'; this run's is 'gpt2'"),
        ({"hook_name": "blocks.0.hook_mlp_out"}, "no activations at blocks.0.hook_mlp_out, only"),
        ({"hook_head_index": 1}, "no activations at .*, head 1"),
        ({"context_size": 4, "n_batches_in_buffer": 40}, "context_size 8; this run's is 4"),
        ({"seqpos_slice": (0, 7)}, r"seqpos_slice \[0, 8, 1\]; this run's is \[0, 7, 1\]"),
        ({"dtype": "bfloat16"}, "float16, which dtype, 'bfloat16', cannot hold"),
        ({"d_in": 8}, "are 16 wide; d_in is 8"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    caches: Caches, cache: Path, options: dict[str, Any], reason: str
) -> None:
    assert cache.exists()
    d_in = options.pop("d_in", 16)
    cfg = caches.config("tokens", **options)
    cfg.sae.d_in = d_in
    with pytest.raises(ValueError, match=f"^cached_activations_path: .*{reason}"):
        check_shards(cfg)


def test_what_may_differ_is_noted(caches: Caches, cache: Path) -> None:
    assert cache.exists()
    check_shards(caches.config("tokens", dtype="float32"))
    check_shards(caches.config("tokens", dtype="float16", lr=1.0, train_batch_size_tokens=8))
    with pytest.warns(UserWarning, match=r"another dataset_path \('made'\), prepend_bos \(True\)$"):
        check_shards(caches.config("tokens", dataset_path="other", prepend_bos=False))


def test_files_are_hashed_when_they_were_touched(
    caches: Caches, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, cfg = read_manifest(cache), caches.config("tokens")
    hashed: list[str] = []
    hash_of = check_module.hash_of

    def note(folder: Path, bar: Any, file: Any) -> str:
        hashed.append(file.name)
        return hash_of(folder, bar, file)

    monkeypatch.setattr(check_module, "hash_of", note)
    check_shards(cfg)
    assert hashed == []
    rows_file(cache).touch()
    check_shards(cfg)
    assert hashed == [rows_file(cache).name]
    check_shards(cfg)
    assert len(hashed) == 1
    (cache / VERIFIED).unlink()  # as in a copy without it
    check_shards(cfg)
    assert sorted(hashed[1:]) == sorted(f.name for s in manifest.shards for f in s.files)


def test_an_alteration_that_hides_is_found_by_hashing_all(cache: Path) -> None:
    path, manifest = rows_file(cache), read_manifest(cache)
    before = path.stat()
    altered(cache)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check_files(cache, manifest) == 0
    with pytest.raises(ValueError, match="was altered"):
        check_files(cache, manifest, hash_all=True)


def test_a_folder_that_cannot_be_written_to_is_hashed_every_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(check_module, "write_whole", refused)
    (cache / VERIFIED).unlink()
    for _ in range(2):
        assert check_files(cache, read_manifest(cache)) > 0
    assert "hashes will be compared again next time" in caplog.text


def test_a_runner_of_saelens_takes_a_whole_cache_of_its_own_activations(
    caches: Caches, cache: Path
) -> None:
    def runner() -> LanguageModelSAETrainingRunner:
        cfg = caches.config("tokens")
        cfg.use_cached_activations = False
        return LanguageModelSAETrainingRunner(
            cfg, override_dataset=caches.data("tokens"), override_model=caches.models["float32"]
        )

    store = use_fast_activations_store(runner(), shards=str(cache))
    manifest = read_manifest(cache)
    assert next(store).shape == (store.train_batch_size_tokens, manifest.hooks[0].d_in)
    for damage in (altered, unfinished):
        damage(cache)
        with pytest.raises(ValueError, match=r"^cached_activations_path: .* cannot be used: "):
            use_fast_activations_store(runner(), shards=str(cache))
