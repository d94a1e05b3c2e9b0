"""Whether the files of a cache are those that were written.

Sizes and headers are compared every time. Hashing reads every byte: a file is hashed once, and
again when its size or its time of modification has changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from sae_lens import logger
from tqdm.auto import tqdm

from saelens_sparse.activations.shards.manifest import (
    HEADER_BYTES,
    Column,
    Manifest,
    ShardFile,
)
from saelens_sparse.config.messages import shown
from saelens_sparse.whole_files import write_whole

# Of files whose hash was compared: size and time of modification at that time.
VERIFIED = "verified.json"
_CHUNK_BYTES = 2**22
# More threads than a processor hashes with: some wait for the disk.
_N_THREADS = 4
# Hashing more than this shows a progress bar.
_MIN_BYTES_SHOWN = 2**31


def check_files(folder: Path, manifest: Manifest, *, hash_all: bool = False) -> int:
    """
    Check that a cache's files are whole and unchanged.

    Args:
        folder: Of the cache.
        manifest: Its manifest.
        hash_all: Whether to hash files too that have not been touched since they were hashed.

    Returns:
        How many bytes were hashed.

    Raises:
        ValueError: a file is missing, cut off, or holds something else than what was written.
    """
    verified = read_verified(folder)
    pending: list[tuple[ShardFile, list[int]]] = []
    for file, column, rows in _files(manifest):
        fingerprint = _check_shape(folder, file, column, rows)
        if hash_all or verified.get(file.name) != fingerprint:
            pending.append((file, fingerprint))
    n_bytes = sum(file.n_bytes for file, _ in pending)
    if not pending:
        return 0
    logger.info("comparing hashes of %d files of %s, %.1f GB", len(pending), folder, n_bytes / 1e9)
    bar: tqdm[Any] = tqdm(
        total=n_bytes, unit="B", unit_scale=True, desc="hashing", disable=n_bytes < _MIN_BYTES_SHOWN
    )
    with bar, ThreadPoolExecutor(_N_THREADS) as threads:
        hashes = threads.map(partial(hash_of, folder, bar), [file for file, _ in pending])
        for (file, fingerprint), found in zip(pending, hashes, strict=True):
            if found != file.xxh3_128:
                raise ValueError(f"{shown(file.name)} was altered since it was written")
            verified[file.name] = fingerprint
    write_verified(folder, verified)
    return n_bytes


def fingerprint_of(path: Path) -> list[int]:
    """Size, and time of modification in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def read_verified(folder: Path) -> dict[str, list[int]]:
    """What `write_verified` has noted."""
    try:
        content = json.loads((folder / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_verified(folder: Path, verified: dict[str, list[int]]) -> None:
    """Note which files need no hashing, unless the folder is one that cannot be written to."""
    try:
        write_whole(folder / VERIFIED, json.dumps(verified))
    except OSError as error:
        logger.warning("hashes will be compared again next time: %s", error)


def _files(manifest: Manifest) -> Iterator[tuple[ShardFile, Column, int]]:
    for shard in manifest.shards:
        for file, column in zip(shard.files, manifest.columns, strict=True):
            yield file, column, shard.rows


def _check_shape(folder: Path, file: ShardFile, column: Column, rows: int) -> list[int]:
    """Compare size and header; gives the fingerprint."""
    path = folder / file.name
    try:
        fingerprint = fingerprint_of(path)
        with path.open("rb") as opened:
            header = opened.read(HEADER_BYTES)
    except OSError as error:
        raise ValueError(f"{shown(file.name)} cannot be read: {error.strerror}") from error
    expected = HEADER_BYTES + rows * column.row_bytes
    if fingerprint[0] != expected or file.n_bytes != expected:
        raise ValueError(f"{shown(file.name)} has {fingerprint[0]} bytes in place of {expected}")
    if header != column.header(rows):
        raise ValueError(f"{shown(file.name)} has another header than was written")
    return fingerprint


def hash_of(folder: Path, bar: tqdm[Any], file: ShardFile) -> str:
    """The hash of what follows a file's header."""
    digest = xxhash.xxh3_128()
    memory = bytearray(_CHUNK_BYTES)
    try:
        with (folder / file.name).open("rb", buffering=0) as opened:
            opened.seek(HEADER_BYTES)
            while n := opened.readinto(memory):
                digest.update(memoryview(memory)[:n])
                bar.update(n)
    except OSError as error:
        raise ValueError(f"{shown(file.name)} cannot be read: {error}") from error
    return digest.hexdigest()
