"""
Trainings in processes of their own, which hit themselves with real signals at chosen moments.

Reads scenarios from standard input, one JSON object a line. Each is run in a fork of this process,
so that libraries are imported once, and answered by a line with the fork's exit status: 130 after
a KeyboardInterrupt, 1 after another error, minus the number of a signal that killed it. What the
fork prints goes to `log.txt` in the scenario's folder.

A scenario has a `folder`, the `architecture` of one SAE or of each of `saes`, `options` of the
runner, and `hits`: the signals, each with its `moment`, and at which occurrence of that moment it
strikes. Other than a signal, a "full disk" strikes, which may have "room again", or a file in the
place of a folder: "no output".
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import wandb
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.config import LoggingConfig
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformerConfig

import saelens_sparse
from saelens_sparse.activations import FastActivationsStore
from saelens_sparse.activations.batches import Batches
from saelens_sparse.training import optimizer as optim
from tests.support.runs import (
    CONTEXT,
    D_MODEL,
    VOCABULARY,
    config_of,
    multi_config,
    runner_config,
)

SLOW = 60
"""Seconds that a batch or an evaluation takes which is hit."""
LARGEST_FILE = 12_000
"""Bytes that fit into a file on a full disk: settings do, weights do not."""


class Hits:
    """The signals still to come."""

    def __init__(self, hits: list[dict[str, Any]], folder: Path) -> None:
        self._hits = hits
        self._folder = folder
        self._seen: Counter[str] = Counter()

    def at(self, moment: str) -> bool:
        """Say that a moment has come; returns whether it was hit."""
        self._seen[moment] += 1
        due = [
            hit for hit in self._hits if (hit["moment"], hit["at"]) == (moment, self._seen[moment])
        ]
        for hit in due:
            name = hit["signal"]
            if name in ("full disk", "room again"):
                limit = LARGEST_FILE if name == "full disk" else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            elif name.startswith("no "):
                (self._folder / name.removeprefix("no ")).touch()
            else:
                os.kill(os.getpid(), getattr(signal, name))
        return bool(due)


def strike_within_files(hits: Hits) -> None:
    """Every file is half written when its moment comes."""
    tensors_file: Any = safetensors.torch
    serialize, save = tensors_file.serialize_file, torch.save

    def cut(path: str | os.PathLike[str]) -> bool:
        os.truncate(path, Path(path).stat().st_size // 2)
        return hits.at(Path(path).name)

    def serialize_file(tensors: Any, path: Any, **options: Any) -> None:
        serialize(tensors, path, **options)
        cut(path)
        serialize(tensors, path, **options)

    def torch_save(content: Any, path: Any) -> None:
        save(content, path)
        cut(path)
        save(content, path)

    def json_dump(content: Any, file: Any) -> None:
        text = json.dumps(content)
        file.write(text[: len(text) // 2])
        file.flush()
        hits.at(Path(file.name).name)
        file.write(text[len(text) // 2 :])

    tensors_file.serialize_file, torch.save, json.dump = serialize_file, torch_save, json_dump


def strike_within_steps(hits: Hits) -> None:
    own_adam: Any = optim.ClippingAdam
    stock_trainer: Any = SAETrainer
    step, update, show = own_adam.step, optim.adam, stock_trainer._update_pbar

    def hit_step(self: Any, **options: Any) -> None:
        hits.at("gradients")
        step(self, **options)

    def hit_update(*args: Any, **options: Any) -> None:
        update(*args, **options)
        hits.at("parameter")

    def hit_between(self: Any, *args: Any) -> None:
        show(self, *args)
        hits.at("between steps")

    own_adam.step, optim.adam, stock_trainer._update_pbar = hit_step, hit_update, hit_between


def strike_while_batches_are_awaited(hits: Hits) -> None:
    own: Any = FastActivationsStore
    run_model = own._run_model

    def hit_model(self: Any, tokens: torch.Tensor) -> Any:
        if hits.at("model"):
            time.sleep(SLOW)
        return run_model(self, tokens)

    own_batches: Any = Batches
    following = own_batches.__next__

    def hit_next(self: Any) -> Any:
        if hits.at("batch"):
            time.sleep(SLOW)
        return following(self)

    own._run_model, own_batches.__next__ = hit_model, hit_next


def train(scenario: dict[str, Any], model: HookedSAETransformer, dataset: Dataset) -> None:
    folder = Path(scenario["folder"])
    hits = Hits(scenario["hits"], folder)
    tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    strike_while_batches_are_awaited(hits)
    strike_within_files(hits)
    strike_within_steps(hits)
    options = scenario["options"]
    if options.pop("evaluates", False):
        for name in ("init", "log", "finish", "log_artifact"):
            setattr(wandb, name, lambda *_, **__: None)
        options["logger"] = LoggingConfig(wandb_log_frequency=5, eval_every_n_wandb_logs=1)

    def evaluator(*_: Any, **__: Any) -> dict[str, Any]:
        if hits.at("evaluation"):
            time.sleep(SLOW)
        return {}

    torch.manual_seed(0)
    sae = config_of(scenario["architecture"])
    if scenario["saes"]:
        saes: Any = dict.fromkeys(scenario["saes"], sae)
        multi = multi_config(saes, folder, **options)
        multi.checkpoint_path = str(folder / "checkpoints")
        runner = saelens_sparse.SparseMultiSAETrainingRunner(
            multi, override_model=model, override_dataset=dataset
        )
    else:
        cfg = runner_config(sae, folder, **options)
        cfg.checkpoint_path = str(folder / "checkpoints")
        runner = saelens_sparse.SparseTrainingRunner(
            cfg, override_model=model, override_dataset=dataset
        )
    runner.evaluator = evaluator  # pyright: ignore[reportAttributeAccessIssue]
    runner.run()


def run_in_fork(scenario: dict[str, Any], model: HookedSAETransformer, dataset: Dataset) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        Path(scenario["folder"]).mkdir(exist_ok=True)
        log = (Path(scenario["folder"]) / "log.txt").open("a")
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        train(scenario, model, dataset)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    model = HookedSAETransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=D_MODEL, n_ctx=CONTEXT, d_head=8, n_heads=2, d_mlp=32,
            act_fn="gelu", d_vocab=VOCABULARY, seed=0,
        )
    )  # fmt: skip
    tokens = torch.randint(2, VOCABULARY, (48, CONTEXT), generator=torch.Generator().manual_seed(3))
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
    print("ready", flush=True)
    for line in sys.stdin:
        print(run_in_fork(json.loads(line), model, dataset), flush=True)


if __name__ == "__main__":
    main()
