"""`saelens-sparse cache`: write the activations of a run once, or check a cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from saelens_sparse.activations.shards.check import check_files
from saelens_sparse.activations.shards.manifest import DTYPE_NAMES, Manifest, read_manifest
from saelens_sparse.activations.shards.match import Config
from saelens_sparse.cache.runner import GB, CacheRunner
from saelens_sparse.config.checks import check_training
from saelens_sparse.config.files import UsageError, usage_errors
from saelens_sparse.language_model import OPTIONS
from saelens_sparse.reports.command_line import Parser, whole_number

DESCRIPTION = """
Write the activations of a run to a folder, once. Runs train from it with use_cached_activations
and cached_activations_path, SAELens's own settings. The config is that of the run: a file, or
SAELens's flags as after `saelens-sparse train`.

An interrupted command goes on when it is given again."""


def main(args: Sequence[str]) -> int:
    """`saelens-sparse cache ARGS`; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    if options.verify is not None:
        if rest:
            raise UsageError(f"--verify takes nothing else than a folder; remove {' '.join(rest)}")
        return _verify(options.verify)
    if not rest:
        raise UsageError("name a config file, or SAELens's flags; --help lists the options")
    cfg = _config(rest)
    with usage_errors():
        runner = CacheRunner(
            cfg,
            options.output,
            dtype=options.dtype,
            tokens=options.tokens,
            shard_bytes=options.shard_bytes,
            language_model=options.language_model,
        )
    if runner.manifest.is_complete:
        print(f"{runner.folder} is complete: {_described(runner.manifest)}. Nothing is to be done.")
        return 0
    print(
        f"{_described(runner.manifest)} go to {runner.folder}; "
        f"{runner.missing_bytes / GB:.1f} GB are missing",
        flush=True,
    )
    try:
        manifest = runner.run()
    except (OSError, ValueError) as error:
        print(f"saelens-sparse: {error}", file=sys.stderr)
        return 1
    print(f"{runner.folder} is complete: {_described(manifest)}")
    return 0


def _parser() -> Parser:
    parser = Parser("cache", DESCRIPTION, allow_abbrev=False)
    parser.usage = "saelens-sparse cache FILE [--set NAME=VALUE ...] | FLAGS [options]"
    add = parser.add_argument
    add(
        "--output",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of the cache (default: cached_activations_path of the config)",
    )
    add("--dtype", choices=[*DTYPE_NAMES], help="of what is written (default: the config's dtype)")
    add("--tokens", type=whole_number(1), help="how many (default: training_tokens)")
    add(
        "--shard-bytes",
        type=whole_number(1),
        help="size of a shard, which is what an interruption loses (default: 1 GiB or more)",
    )
    add(
        "--language-model",
        choices=OPTIONS,
        default="auto",
        help="saelens computes activations as SAELens does, bit for bit (default: %(default)s)",
    )
    add("--verify", type=Path, metavar="FOLDER", help="hash every file of a cache; nothing else")
    return parser


def _config(rest: Sequence[str]) -> Config:
    from saelens_sparse.cli import parse_train_args  # it names this module

    cfg = parse_train_args(rest)
    if cfg.use_cached_activations and cfg.cached_activations_path is not None:
        cfg.use_cached_activations = False  # it is what is to be made
    with usage_errors():
        check_training(cfg)
    return cfg


def _verify(folder: Path) -> int:
    with usage_errors():
        manifest = read_manifest(folder)
        check_files(folder, manifest, hash_all=True)
    print(f"{folder} is unchanged: {_described(manifest)}")
    return 0


def _described(manifest: Manifest) -> str:
    hooks = ", ".join(hook.name for hook in manifest.hooks)
    size = manifest.rows * manifest.row_bytes / GB
    return f"{manifest.rows:,} tokens at {hooks}, {manifest.dtype}, {size:.1f} GB"
