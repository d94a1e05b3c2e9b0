"""The format of a cache: safetensors files of rows, and a manifest that says what they are.

A shard is a file of token ids and a file for each hook. Row i of each is of the same token. A file
has one tensor, behind a header of `HEADER_BYTES`. Each file can be mapped, and be opened by any
tool that reads safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from saelens_sparse.whole_files import write_whole

MANIFEST = "manifest.json"
FORMAT, VERSION = "saelens_sparse activations", 1
HEADER_BYTES = 4096  # a page, so that rows of a mapped file are aligned
TOKENS, TOKEN_COLUMN = "tokens", 0
# Names in safetensors files, and in manifests.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Hook(NamedTuple):
    """
    Where activations come from.

    Attributes:
        name: of the hook point.
        head_index: of an attention head; None for all of the activation.
        d_in: width of an activation.
    """

    name: str
    head_index: int | None
    d_in: int


class Column(NamedTuple):
    """
    What one file of each shard holds.

    Attributes:
        label: in the files' names.
        width: values of a row; None for a tensor of one dimension.
        dtype: of the values.
    """

    label: str
    width: int | None
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return (self.width or 1) * self.dtype.itemsize

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def header(self, rows: int) -> bytes:
        """The beginning of a file of so many rows, `[HEADER_BYTES]`, as safetensors defines it."""
        size = rows * self.row_bytes
        shape = self.shape(rows)
        tensor = {"dtype": DTYPES[self.dtype], "shape": shape, "data_offsets": [0, size]}
        text = json.dumps({"__metadata__": {"format": "pt"}, self.label: tensor}).encode()
        length = HEADER_BYTES - 8
        return length.to_bytes(8, "little") + text.ljust(length)


class ShardFile(NamedTuple):
    """
    A file of a shard.

    Attributes:
        name: in the cache's folder.
        n_bytes: its size, with the header.
        xxh3_128: hash of what follows the header, in hexadecimal digits.
    """

    name: str
    n_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Shard:
    """
    Rows that are whole on the disk.

    Attributes:
        rows: how many.
        files: those of the manifest's `columns`, in their order.
    """

    rows: int
    files: tuple[ShardFile, ...]


@dataclass(frozen=True)
class Manifest:
    """
    What a cache holds.

    Attributes:
        hooks: whose activations it has.
        dtype: "float32", "bfloat16" or "float16".
        rows: how many it will have; how many it has, once it is complete.
        rows_per_shard: of all shards but the last.
        settings: the fields of the config that decide what the activations are.
        config: all of the config.
        shards: what is written.
        is_complete: whether that is all.
        resume: where the source of activations stood after the last shard; empty once complete.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    hooks: tuple[Hook, ...]
    dtype: str
    rows: int
    rows_per_shard: int
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    shards: tuple[Shard, ...] = ()
    is_complete: bool = False
    resume: str = field(default="", repr=False)

    @property
    def columns(self) -> list[Column]:
        """Of token ids, then of each hook."""
        dtype = DTYPE_NAMES[self.dtype]
        return [
            Column(TOKENS, None, torch.int32),
            *(Column(f"hook_{i}", hook.d_in, dtype) for i, hook in enumerate(self.hooks)),
        ]

    @property
    def rows_written(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """Of all columns."""
        return sum(column.row_bytes for column in self.columns)

    @property
    def identity(self) -> str:
        """Tells the contents of two caches apart."""
        hashes = "".join(file.xxh3_128 for shard in self.shards for file in shard.files)
        return xxhash.xxh3_64_hexdigest(hashes.encode())

    def with_shard(self, shard: Shard, resume: str) -> Manifest:
        return replace(self, shards=(*self.shards, shard), resume=resume)

    def completed(self) -> Manifest:
        return replace(self, rows=self.rows_written, is_complete=True, resume="")

    def write(self, folder: Path) -> None:
        """Put it into the folder, in the place of an older one."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["hooks"] = [hook._asdict() for hook in self.hooks]
        content["shards"] = [
            {"rows": shard.rows, "files": [file._asdict() for file in shard.files]}
            for shard in self.shards
        ]
        write_whole(folder / MANIFEST, json.dumps(content, indent=1))

    def positions_of(self, hooks: Sequence[Hook]) -> list[int]:
        """Which columns hold those hooks' activations.

        Raises:
            ValueError: there is none, or its width is another one.
        """
        found: list[int] = []
        for hook in hooks:
            names = [(known.name, known.head_index) for known in self.hooks]
            if (hook.name, hook.head_index) not in names:
                have = ", ".join(map(_spelled, self.hooks))
                raise ValueError(f"it has no activations at {_spelled(hook)}, only at {have}")
            index = names.index((hook.name, hook.head_index))
            if self.hooks[index].d_in != hook.d_in:
                d_in = self.hooks[index].d_in
                raise ValueError(
                    f"its activations at {_spelled(hook)} are {d_in} wide; d_in is {hook.d_in}"
                )
            found.append(1 + index)
        return found


_MANIFESTS = TypeAdapter(Manifest)


def is_sharded(path: str | Path | None) -> bool:
    """Whether a folder has a manifest: else it is a cache in SAELens's format, or none."""
    try:
        return path is not None and (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def read_manifest(folder: Path) -> Manifest:
    """
    The manifest of a cache.

    Raises:
        ValueError: it cannot be read, or is of another version.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        name, version = content.pop("format"), content.pop("version")
        if (name, version) != (FORMAT, VERSION):
            raise ValueError(f"it is of the format {name!r}, version {version!r}")
        manifest = _MANIFESTS.validate_python(content)
        n_files = len(manifest.columns)
        if any(len(shard.files) != n_files for shard in manifest.shards):
            raise ValueError(f"a shard has not {n_files} files")
        if manifest.is_complete and manifest.rows != manifest.rows_written:
            raise ValueError(
                f"its shards have {manifest.rows_written:,} tokens in place of {manifest.rows:,}"
            )
    except ValidationError as error:
        [first, *_] = error.errors()
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"{str(folder / MANIFEST)!r} cannot be read: {what}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(folder / MANIFEST)!r} cannot be read: {error}") from error
    return manifest


def _spelled(hook: Hook) -> str:
    return hook.name if hook.head_index is None else f"{hook.name}, head {hook.head_index}"
