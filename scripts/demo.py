"""Trains a sparse architecture and its stock counterpart side by side, and compares them.

Both arms train through SAELens's stock runner on the same activations of SmolLM2-135M, in the
same order, from the same weights. They take turns, a step each, so that their times can be
compared on a busy machine too. The result is a table, a plot, the numbers of both as JSON, and
the two SAEs.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from demo_report import Step, format_table, headline, plot, summarize
from tqdm import tqdm

SCRIPTS = Path(__file__).parent
ROOT = SCRIPTS.parent
# The sparse architectures and the config of each.
DEMO_CONFIGS = {
    "topk_sparse": ROOT / "configs" / "smollm2_demo_topk.json",
    "jumprelu_sparse": ROOT / "configs" / "smollm2_demo_jumprelu.json",
}
# What sets L0, by architecture: an option of the demo and a field of the config.
SPARSITY_FIELDS = {"topk_sparse": "k", "jumprelu_sparse": "l0_coefficient"}
IMPLEMENTATIONS = ("auto", "triton", "torch", "dense")

# The config's sizes are for a CPU; at those a GPU would mostly wait for its host.
GPU_D_SAE, GPU_BATCH_SIZE = 65_536, 4096


class DemoError(Exception):
    """A part of the demo failed; the message says which one, and where to look."""


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a value that cannot work ends the program and names its option."""
    configs = {name: json.loads(path.read_text()) for name, path in DEMO_CONFIGS.items()}
    config = configs["topk_sparse"]  # in what they share
    sae, batch_size = config["sae"], config["train_batch_size_tokens"]
    parser = argparse.ArgumentParser(
        prog="demo.sh",
        description="Train a sparse architecture and its stock counterpart side by side on a real "
        "language model's activations.",
    )

    def add(
        option: str, description: str, default_text: str = "%(default)s", **kwargs: Any
    ) -> None:
        parser.add_argument(option, help=f"{description} (default: {default_text})", **kwargs)

    add(
        "--architecture",
        "the sparse architecture; its stock counterpart is the other arm",
        choices=DEMO_CONFIGS,
        default="topk_sparse",
    )
    add(
        "--implementation",
        "what computes the sparse arm",
        choices=IMPLEMENTATIONS,
        default=sae["implementation"],
    )
    add(
        "--steps",
        "training steps of each arm",
        type=positive_int,
        default=config["training_tokens"] // batch_size,
    )
    add("--d-sae", "number of latents", f"{sae['d_sae']}, on a GPU {GPU_D_SAE}", type=positive_int)
    add("--k", "active latents per token of topk_sparse", str(sae["k"]), type=positive_int)
    add(
        "--l0-coefficient",
        "coefficient of the sparsity loss of jumprelu_sparse",
        str(configs["jumprelu_sparse"]["sae"]["l0_coefficient"]),
        type=positive_float,
    )
    add(
        "--batch-size",
        "tokens per step",
        f"{batch_size}, on a GPU {GPU_BATCH_SIZE}",
        type=positive_int,
    )
    add("--seed", "seed of weights and batches", type=int, default=config["seed"])
    add("--device", "where to train, as in cuda:0", "a GPU if there is one", type=device_name)
    add("--autocast", "train both arms under bfloat16 autocast", "no", action="store_true")
    add("--text-tokens", "how much of the text to use", "all of it", type=positive_int)
    add("--output", "folder of the results", type=Path, default=ROOT / "demo_output")
    add("--cache", "folder of the model and activations", type=Path, default=ROOT / ".cache")
    options = parser.parse_args(args)

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device.startswith("cuda")
    options.d_sae = options.d_sae or (GPU_D_SAE if on_gpu else sae["d_sae"])
    options.batch_size = options.batch_size or (GPU_BATCH_SIZE if on_gpu else batch_size)

    for architecture, field in SPARSITY_FIELDS.items():
        if architecture == options.architecture:
            if getattr(options, field) is None:
                setattr(options, field, configs[architecture]["sae"][field])
        elif getattr(options, field) is not None:
            option = field.replace("_", "-")
            parser.error(f"argument --{option}: {options.architecture} has no such setting")
    if options.k is not None and options.k > options.d_sae:
        parser.error(f"argument --k: {options.k} is more than the {options.d_sae} of --d-sae")
    largest_batch = config["n_batches_in_buffer"] * config["context_size"] // 2
    if options.batch_size > largest_batch:
        parser.error(
            f"argument --batch-size: {options.batch_size} is more than {largest_batch}, "
            "half of the buffer that activations are shuffled in"
        )
    for option in ("output", "cache"):
        path = getattr(options, option).resolve()
        if path.exists() and not path.is_dir():
            parser.error(f"argument --{option}: {path} is not a folder")
        setattr(options, option, path)
    return options


def positive_int(text: str) -> int:
    """argparse type: an integer from 1 up."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def device_name(text: str) -> str:
    """argparse type: a device on which this PyTorch can put a tensor."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return text


def arm_config(options: argparse.Namespace, architecture: str) -> dict[str, Any]:
    """The SAELens runner config of one arm: the demo's config with the options put in."""
    config = json.loads(DEMO_CONFIGS[options.architecture].read_text())
    sparsity_field = SPARSITY_FIELDS[options.architecture]
    activations = "activations"
    if options.text_tokens is not None:
        activations += f"-{options.text_tokens}-tokens"
    config["sae"] |= {
        "architecture": architecture,
        "d_sae": options.d_sae,
        sparsity_field: getattr(options, sparsity_field),
        "device": options.device,
        "implementation": options.implementation,
    }
    return config | {
        "model_name": str(options.cache / Path(config["model_name"]).name),
        "dataset_path": str(options.cache / Path(config["dataset_path"]).name),
        "cached_activations_path": str(options.cache / activations),
        "training_tokens": options.steps * options.batch_size,
        "train_batch_size_tokens": options.batch_size,
        "seed": options.seed,
        "device": options.device,
        "autocast": options.autocast,
        "output_path": str(options.output / architecture / "sae"),
    }


def prepare_inputs(config_file: Path, text_tokens: int | None) -> None:
    """Make the model, the text and the activations, unless an earlier run has left them."""
    config = json.loads(config_file.read_text())
    inputs = ("model_name", "dataset_path", "cached_activations_path")
    if all(Path(config[name]).exists() for name in inputs):
        return
    print("Preparing SmolLM2-135M and its activations on Python's documentation (once)", flush=True)
    command = [sys.executable, str(SCRIPTS / "demo_inputs.py"), str(config_file)]
    if text_tokens is not None:
        command += ["--text-tokens", str(text_tokens)]
    if subprocess.run(command, env=child_environment(), check=False).returncode:
        raise DemoError("the inputs could not be prepared; the error is above")


def child_environment() -> dict[str, str]:
    """This process's environment; everything is local, no library needs to ask a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


class Arm:
    """A training process of demo_arm.py, which takes a step whenever it is asked to.

    Args:
        folder: Has the name of the architecture, and holds the runner config, `config.json`. The
            arm adds `steps.jsonl`, `log.txt` and the SAE.
    """

    def __init__(self, folder: Path) -> None:
        self.architecture = folder.name
        self.folder = folder
        self.steps: list[Step] = []
        self._steps_file = (folder / "steps.jsonl").open("w", buffering=1)
        with (folder / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / "demo_arm.py"), str(folder / "config.json")],
                env=child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )

    def __enter__(self) -> "Arm":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception is not None:
            self._process.terminate()
        with self._process:  # closes its pipes, and waits for its end
            self._steps_file.close()

    def wait_until_ready(self) -> None:
        """Return when the arm has its next batch, and does nothing but wait for its turn."""
        self._read_line()

    def take_step(self) -> Step:
        """Let the arm train one step."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
        except BrokenPipeError:
            self._raise_failed()
        line = self._read_line()
        self._steps_file.write(line)
        step = Step(**json.loads(line))
        self.steps.append(step)
        return step

    def finish(self) -> None:
        """Return when the arm has saved its SAE after the last step."""
        if self._process.wait():
            self._raise_failed()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline() or self._raise_failed()

    def _raise_failed(self) -> NoReturn:
        self._process.wait()
        log = self.folder / "log.txt"
        errors = [line for line in log.read_text().splitlines() if re.match(r"[\w.]+Error: ", line)]
        reason = errors[-1] if errors else f"exit status {self._process.returncode}"
        raise DemoError(f"training {self.architecture} failed: {reason}\nThe whole log: {log}")


def train_side_by_side(arms: Sequence[Arm], n_steps: int) -> None:
    """Give the arms their turns, a step each, until all have taken `n_steps`."""
    for arm in arms:
        arm.wait_until_ready()
    with tqdm(total=n_steps, unit="step", dynamic_ncols=True) as bar:
        for index in range(n_steps):
            for arm in arms:
                arm.take_step()
                if index + 1 < n_steps:
                    arm.wait_until_ready()
            bar.set_postfix_str(progress(arms), refresh=False)
            bar.update()
    for arm in arms:
        arm.finish()


def progress(arms: Sequence[Arm]) -> str:
    """What the progress bar says: the arms' latest losses and times."""
    losses = " | ".join(f"{arm.steps[-1].mse_loss:.4g}" for arm in arms)
    times = " | ".join(f"{1e3 * arm.steps[-1].seconds:.0f}" for arm in arms)
    return f"loss {losses}, ms {times}"


def check_in_stock_saelens(config_file: Path) -> str:
    """Open the SAE that a config names where the plugin cannot be imported; one line on it."""
    config = json.loads(config_file.read_text())
    script = str(SCRIPTS / "open_in_stock_saelens.py")
    process = subprocess.run(
        [sys.executable, script, config["output_path"], config["cached_activations_path"]],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise DemoError(f"stock SAELens could not open the SAE:\n{process.stderr}")
    return process.stdout.strip().splitlines()[-1]


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the options."""
    packages = ("saelens-sparse", "sae-lens", "torch", "transformer-lens")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        **{package: version(package) for package in packages},
    }


def report(
    options: argparse.Namespace, arms: Sequence[Arm], status: str, opened: str | None
) -> None:
    """Write and print whatever the arms have produced."""
    # An interrupted arm may be a step behind: compare the steps that all of them took.
    common = min((len(arm.steps) for arm in arms), default=0)
    steps = {arm.architecture: arm.steps[:common] for arm in arms if common}
    summaries = [summarize(name, taken, options.batch_size) for name, taken in steps.items()]
    results = {
        "status": status,
        "options": vars(options),
        "environment": environment(options.device),
        "arms": [asdict(summary) for summary in summaries],
        "opened_in_stock_saelens": opened,
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    if not summaries:
        return
    title = headline(*summaries)
    plot(steps, title, options.output / "curves.png")
    print(f"\n{title}\n\n{format_table(*summaries)}\n")
    if opened is not None:
        print(f"Opened by stock SAELens without the plugin: {opened}")
    print(f"Plot, numbers and SAEs: {options.output}")


def main(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = parse_options(args)
    folders: list[Path] = []
    for architecture in (options.architecture.removesuffix("_sparse"), options.architecture):
        folders.append(options.output / architecture)
        folders[-1].mkdir(parents=True, exist_ok=True)
        config = json.dumps(arm_config(options, architecture), indent=2)
        (folders[-1] / "config.json").write_text(config + "\n")
    # SIGTERM, like Ctrl-C, keeps what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    status, opened = "complete", None
    arms: list[Arm] = []
    try:
        prepare_inputs(folders[0] / "config.json", options.text_tokens)
        with ExitStack() as running:
            arms += [running.enter_context(Arm(folder)) for folder in folders]
            print(f"Training {' and '.join(arm.architecture for arm in arms)} in turn", flush=True)
            train_side_by_side(arms, options.steps)
        opened = check_in_stock_saelens(folders[-1] / "config.json")
    except KeyboardInterrupt:
        status = "interrupted"
    except DemoError as error:
        status = "failed"
        print(f"demo: {error}", file=sys.stderr)
    report(options, arms, status, opened)
    return {"complete": 0, "failed": 1, "interrupted": 130}[status]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
