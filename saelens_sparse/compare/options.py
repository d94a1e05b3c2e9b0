"""What is compared: from the command line and a runner config to a config for each arm."""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.compare.arguments import build_parser
from saelens_sparse.compare.embedded_inputs import EMBEDDED_CONFIGS, INPUT_FIELDS
from saelens_sparse.compare.records import ArmFolder
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
from saelens_sparse.profile.cases import SPARSE_SUFFIX
from saelens_sparse.reports.command_line import default_device

# The embedded config's sizes are for a CPU; at those a GPU would mostly wait for its host.
GPU_D_SAE, GPU_BATCH_SIZE = 65_536, 4096
# Options that are fields of the config.
FIELD_OPTIONS = {
    "d_sae": "sae.d_sae",
    "k": "sae.k",
    "l0_coefficient": "sae.l0_coefficient",
    "implementation": "sae.implementation",
    "batch_size": "train_batch_size_tokens",
    "seed": "seed",
    "checkpoints": "n_checkpoints",
    "eval_batches": "n_eval_batches",
}


@dataclass(frozen=True)
class Comparison:
    """
    All that decides what is trained, and where its results go.

    Args:
        name: Of the config.
        output: Folder of the results.
        configs: The runner config of each arm by architecture, in the form of
            `LanguageModelSAERunnerConfig.to_dict`; the first one is what the second is held
            against.
        runners: "stock" or "own" for each arm: SAELens's runner or `SparseTrainingRunner`.
        embedded: Whether the inputs are those that `embedded_inputs` makes.
        text_tokens: How much of the embedded text to use; None is all of it.
        overwrite: Whether results of another comparison in `output` may go.
        dropped: Fields that the config's architecture has and neither arm.
        unprefetched: Whether the config's `prefetch_llm_batches` was turned off.
    """

    name: str
    output: Path
    configs: dict[str, dict[str, Any]]
    runners: dict[str, str]
    embedded: bool
    text_tokens: int | None
    overwrite: bool
    dropped: list[str]
    unprefetched: bool

    @property
    def folders(self) -> list[ArmFolder]:
        """Where each arm keeps what it makes."""
        return [ArmFolder(self.output / architecture) for architecture in self.configs]

    @property
    def shared(self) -> dict[str, Any]:
        """The first arm's config, for what both have in common."""
        return next(iter(self.configs.values()))

    @property
    def n_steps(self) -> int:
        """Training steps of each arm."""
        return -(-self.shared["training_tokens"] // self.shared["train_batch_size_tokens"])

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for results to be those of this comparison."""
        return {"arms": self.configs, "runners": self.runners, "text_tokens": self.text_tokens}


def parse_comparison(args: Sequence[str]) -> Comparison:
    """
    The comparison that a command line asks for.

    Raises:
        UsageError: a setting that cannot work, by its name; nothing has been loaded yet.
    """
    options = build_parser().parse_args(args)
    embedded = options.config is None
    if not embedded:
        for option in ("text_tokens", "cache"):
            if getattr(options, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')}: CONFIG brings its own inputs")
    if embedded:
        name, config = _embedded_config(options)
    else:
        name, config = Path(options.config).stem, read_config(options.config)
    of_config = config["sae"]["architecture"]
    pair = _architectures(options, of_config)
    _override(config, options)
    output = (options.output or Path("output") / f"compare_{name}").resolve()
    for option in ("k", "l0_coefficient", "implementation"):
        if getattr(options, option) is not None:
            _check_option(option, pair)
    with usage_errors():
        check_fields(config, {of_config, *pair})
        check_writable("--output", output, 0)
    if options.text_tokens is not None:
        config["cached_activations_path"] += f"-{options.text_tokens}-tokens"
    configs = {architecture: _arm_config(config, architecture, output) for architecture in pair}
    for arm in configs.values():
        # The embedded inputs are made after this.
        made_later = dict.fromkeys(INPUT_FIELDS, str(Path.cwd())) if embedded else {}
        with usage_errors():
            cfg = LanguageModelSAERunnerConfig.from_dict(copy.deepcopy(arm | made_later))
            check_training(cfg)
            check_runner_outputs(cfg)
    return Comparison(
        name=name,
        output=output,
        configs=configs,
        runners={
            architecture: options.runner if is_sparse(architecture) else "stock"
            for architecture in pair
        },
        embedded=embedded,
        text_tokens=options.text_tokens,
        overwrite=options.overwrite,
        dropped=sorted(
            set(config["sae"]).difference({"metadata"}, *(arm["sae"] for arm in configs.values()))
        ),
        unprefetched=bool(config.get("prefetch_llm_batches")),
    )


def is_sparse(architecture: str) -> bool:
    """Whether the architecture is one of this package's."""
    return issubclass(SAE_TRAINING_CLASS_REGISTRY[architecture][0], SparseTrainingSAEMixin)


def _embedded_config(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The name and the config of the embedded default, for the device that there is."""
    architecture = options.architecture
    if architecture is None:
        names = (options.architectures or "topk_sparse").split(",")
        architecture = next((name for name in EMBEDDED_CONFIGS if name in names), "topk_sparse")
    if architecture not in EMBEDDED_CONFIGS:
        allowed = " or ".join(EMBEDDED_CONFIGS)
        raise UsageError(f"--architecture: {architecture!r}; without CONFIG it is {allowed}")
    path = EMBEDDED_CONFIGS[architecture]
    config = json.loads(path.read_text())
    steps = config["training_tokens"] // config["train_batch_size_tokens"]
    options.device = options.device or default_device()
    if options.device.startswith("cuda"):
        options.d_sae = options.d_sae or GPU_D_SAE
        options.batch_size = options.batch_size or GPU_BATCH_SIZE
    options.steps = options.steps or steps
    cache = (options.cache or _default_cache()).resolve()
    inputs = {field: str(cache / Path(config[field]).name) for field in INPUT_FIELDS}
    return path.stem, config | inputs


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saelens-sparse"


def _architectures(options: argparse.Namespace, of_config: str) -> list[str]:
    """The two arms, the one that the other is held against first."""
    if options.architectures is not None:
        if options.architecture is not None:
            raise UsageError("--architecture, --architectures: give one of them")
        pair = options.architectures.split(",")
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UsageError(f"--architectures: {options.architectures!r} is not two names A,B")
    else:
        name = options.architecture or of_config
        stock = name.removesuffix(SPARSE_SUFFIX)
        pair = [stock, stock + SPARSE_SUFFIX]
    known = ", ".join(SAE_TRAINING_CLASS_REGISTRY)
    unknown = [name for name in pair if name not in SAE_TRAINING_CLASS_REGISTRY]
    if not unknown:
        return pair
    if options.architectures is not None:
        raise UsageError(f"--architectures: {unknown[0]!r} is not registered; registered: {known}")
    source, name = (
        ("sae.architecture", of_config)
        if options.architecture is None
        else ("--architecture", options.architecture)
    )
    raise UsageError(
        f"{source}: {name!r} has no counterpart {unknown[0]!r}; "
        f"name both arms with --architectures A,B (registered: {known})"
    )


def _override(config: dict[str, Any], options: argparse.Namespace) -> None:
    """Put the options into the config."""
    for option, field in FIELD_OPTIONS.items():
        if getattr(options, option) is not None:
            _set_field(config, field, getattr(options, option))
    if options.autocast:
        config["autocast"] = True
    if options.device is not None:
        before = config.get("device")
        for field in ("llm_device", "act_store_device"):
            if config.get(field) == before:
                config[field] = options.device
        config["device"] = config["sae"]["device"] = options.device
    for setting in options.set:
        field, separator, text = setting.partition("=")
        if not separator:
            raise UsageError(f"--set: {setting!r} is not FIELD=VALUE")
        try:
            value = parse_json(text)
        except json.JSONDecodeError:
            value = text
        except ValueError as error:
            raise UsageError(f"{field}: {shown(text)} cannot be used: {error}") from error
        _set_field(config, field, value)
    if options.steps is not None:
        batch = config.get("train_batch_size_tokens", 4096)
        if isinstance(batch, int):  # else it is about to be refused
            config["training_tokens"] = options.steps * batch


def _set_field(config: dict[str, Any], field: str, value: Any) -> None:
    *groups, name = field.split(".")
    for group in groups:
        if not isinstance(config.get(group), dict):
            raise UsageError(f"{field}: there is no such field")
        config = config[group]
    config[name] = value


def _check_option(option: str, pair: Sequence[str]) -> None:
    """An option that no arm has a field for is a mistake."""
    classes = [SAE_TRAINING_CLASS_REGISTRY[architecture][1] for architecture in pair]
    if not any(option in config_class.__dataclass_fields__ for config_class in classes):
        names = " and ".join(pair)
        raise UsageError(f"--{option.replace('_', '-')}: {names} have no such setting")


def _arm_config(config: dict[str, Any], architecture: str, output: Path) -> dict[str, Any]:
    """The whole config of one arm: its architecture, the fields it has, and its own places."""
    folder = ArmFolder(output / architecture)
    fields = SAE_TRAINING_CLASS_REGISTRY[architecture][1].__dataclass_fields__
    logger = dict(config["logger"])
    # Runs of one project would otherwise share their name and, where it is given, their id.
    for name in ("run_name", "wandb_id"):
        if logger.get(name) is not None:
            logger[name] = f"{logger[name]}-{architecture}"
    arm = {
        **config,
        "sae": {name: value for name, value in config["sae"].items() if name in fields}
        | {"architecture": architecture},
        "logger": logger,
        # It would run in the other arm's turn, unseen by the clock.
        "prefetch_llm_batches": False,
        "checkpoint_path": str(folder.checkpoints),
        "output_path": str(folder.sae),
    }
    with usage_errors(f"the config cannot be used for {architecture}: "):
        whole = config_from(arm).to_dict()
    del whole["sae"]["metadata"]  # the runner's to fill in
    return whole
