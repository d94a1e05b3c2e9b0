"""What is in a cache's folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from saelens_sparse.activations.shards.check import check_files
from saelens_sparse.activations.shards.manifest import (
    HEADER_BYTES,
    MANIFEST,
    VERSION,
    Hook,
    Manifest,
    read_manifest,
)
from saelens_sparse.activations.shards.writer import ShardWriter
from tests.support.cache import HOOKS, contents, rows_of, write_shards

N_ROWS, PER_SHARD = 112, 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_hold_the_rows_in_their_order(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    manifest = write_shards(tmp_path, N_ROWS, PER_SHARD, dtype=name)
    assert [shard.rows for shard in manifest.shards] == [48, 48, 16]
    tokens, *parts = contents(tmp_path)
    assert torch.equal(tokens, torch.arange(N_ROWS, dtype=torch.int32))
    for hook, part in zip(HOOKS, parts, strict=True):
        assert torch.equal(part, rows_of(hook, N_ROWS).to(dtype))
    assert read_manifest(tmp_path) == manifest
    assert check_files(tmp_path, manifest, hash_all=True) == sum(
        file.n_bytes for shard in manifest.shards for file in shard.files
    )


def test_a_file_can_be_mapped_from_a_page_on(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, N_ROWS, PER_SHARD)
    path = tmp_path / manifest.shards[1].files[1].name
    n_values = 48 * HOOKS[0].d_in
    mapped = torch.from_file(str(path), size=HEADER_BYTES // 4 + n_values)[HEADER_BYTES // 4 :]
    assert torch.equal(mapped.view(48, -1), rows_of(HOOKS[0], N_ROWS)[48:96])
    with safe_open(path, "pt") as tensors:
        assert [*tensors.keys()] == ["hook_0"]


def test_the_manifest_is_json_that_says_what_there_is(tmp_path: Path) -> None:
    write_shards(tmp_path, N_ROWS, PER_SHARD)
    content = json.loads((tmp_path / MANIFEST).read_text())
    assert content["version"] == VERSION
    assert content["hooks"][1] == {"name": "b", "head_index": 1, "d_in": 3}
    assert (content["rows"], content["dtype"], content["is_complete"]) == (112, "float32", True)
    for shard in content["shards"]:
        for file in shard["files"]:
            assert (tmp_path / file["name"]).stat().st_size == file["n_bytes"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "zarr"}, "'zarr'"),
        ({"shards": [{"rows": 1, "files": []}]}, "a shard has not 3 files"),
        ({"shards": 3}, "cannot be read"),
        ({"hooks": [{"name": "a"}]}, "cannot be read"),
        ({"colour": 1}, "cannot be read: colour: "),
        ({"dtype": "int8"}, "cannot be read: 'int8'"),
        ({"rows": "many"}, r"cannot be read: rows: .*integer"),
        ({"settings": None}, r"cannot be read: settings: "),
        (
            {"hooks": [{"name": "a", "head_index": None, "d_in": "x"}]},
            r"cannot be read: hooks\.0\.",
        ),
        ({"shards": []}, "its shards have 0 tokens in place of 112"),
        ({"rows": -1}, "its shards have 112 tokens in place of -1"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    write_shards(tmp_path, N_ROWS, PER_SHARD)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=reason):
        read_manifest(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(tmp_path)


def test_what_float16_cannot_hold_is_not_written(tmp_path: Path) -> None:
    hook = Hook("a", None, 2)
    for value in (65_519.0, float("inf"), float("nan")):
        writer = ShardWriter(tmp_path, Manifest((hook,), "float16", 2, 2, {}, {}))
        writer.add([torch.full((2, 2), value)], torch.arange(2))
        writer.end_shard("")
        writer.complete()
    writer = ShardWriter(tmp_path, Manifest((hook,), "float16", 2, 2, {}, {}))

    def write() -> None:  # its thread says so at one of these calls
        writer.add([torch.full((2, 2), 65_520.0)], torch.arange(2))
        writer.end_shard("")
        writer.complete()

    with pytest.raises(ValueError, match=r"float16 cannot hold .* allowed: bfloat16 or float32"):
        write()
    assert writer.abandon().shards == ()
