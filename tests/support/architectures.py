"""Every registered architecture as the tests see it: small SAEs, inputs, and where they run.

A new architecture needs no entry here to be held to the contract; `TRAITS` says what its tests do
not find out by themselves.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from saelens_sparse.architectures import ARCHITECTURES, Architecture
from tests.conftest import TARGETS, Target, marks
from tests.support.jumprelu import D_SAE as D_SAE_OF_JUMPRELU
from tests.support.jumprelu import (
    OPTIONS,
    PATHS,
    THREE_OPTIONS,
    bandwidth_of,
    decided_inputs,
    make_jumprelu,
)
from tests.support.matryoshka import make_matryoshka, matryoshka_inputs
from tests.support.saes import (
    FLOAT32,
    Precision,
    make_stock,
    randomize,
    rows_for_batch_topk,
    runs,
    sparse_like,
    superposed_rows,
    zipf_inputs,
)

Options = Mapping[str, Mapping[str, Any]]

TOPK_OPTIONS: dict[str, dict[str, Any]] = {
    f"{'rescaled' if rescale else 'raw'}-{'centred' if centre else 'uncentred'}": {
        "rescale_acts_by_decoder_norm": rescale,
        "apply_b_dec_to_input": centre,
    }
    for rescale, centre in itertools.product((True, False), repeat=2)
}
ALL_OR_NO_OPTIONS = {name: TOPK_OPTIONS[name] for name in ("rescaled-centred", "raw-uncentred")}
MATRYOSHKA_OPTIONS = {
    f"{name}-{'level' if of_level else 'whole'}-error": {
        **options, "use_matryoshka_aux_loss": of_level,
    }
    for of_level in (True, False)
    for name, options in TOPK_OPTIONS.items()
}  # fmt: skip
TWO_MATRYOSHKA_OPTIONS = {
    name: MATRYOSHKA_OPTIONS[name]
    for name in ("rescaled-centred-level-error", "raw-uncentred-whole-error")
}
CENTRED_OR_NOT: Options = {
    "centred": {"apply_b_dec_to_input": True},
    "uncentred": {"apply_b_dec_to_input": False},
}

# Names of paths. A step of some architectures takes seconds in Triton's interpreter.
EVERYWHERE = frozenset(PATHS)
NOT_INTERPRETED = frozenset(name for name, target in PATHS.items() if not target.interpreted)
SPARSE = frozenset(TARGETS) & NOT_INTERPRETED
ON_CPU = frozenset({"torch-cpu"})


def random_rows(
    stock: Any, n_rows: int, precision: Precision, dead: torch.Tensor | None
) -> torch.Tensor:
    del precision, dead
    return superposed_rows(stock, n_rows)


@dataclass(frozen=True)
class Traits:
    """
    What the tests have to know of an architecture beside its registration.

    Attributes:
        options: the product of its options, by name.
        few_options: configurations that show each value of an option.
        paths: what it computes with, by name.
        steps_interpreted: whether steps in Triton's interpreter take less than seconds.
        make_stock: a stock SAE with random weights.
        inputs: rows for which rounding moves no active latent, of an SAE whose biases it may
            shift; they also decide which dead latents AuxK takes, if a mask is given.
        fields: configuration in which a step shows most on a path and in a precision.
        screened: further fields with which the kernels search by a screen.
        large: further fields of an SAE whose sums several threads share.
        reconstruction_alone: fields with which no other loss is trained.
        own_fields: defaults of the fields that stock does not have, beside those that all
            architectures have.
        own_files: what it writes into a checkpoint beside the files of stock.
        takes_plain_rows_only: whether stock's training pass fails for all inputs but rows
            `[n_rows, d_in]`, and for those that are normalized at run time.
    """

    options: Options = field(default_factory=lambda: CENTRED_OR_NOT)
    few_options: Options = field(default_factory=lambda: CENTRED_OR_NOT)
    paths: Mapping[str, Target] = field(default_factory=lambda: TARGETS)
    steps_interpreted: bool = True
    make_stock: Callable[..., Any] | None = None
    inputs: Callable[[Any, int, Precision, torch.Tensor | None], torch.Tensor] = random_rows
    fields: Callable[[Target, Precision], Mapping[str, Any]] = lambda *_: {}
    screened: Mapping[str, Any] = field(default_factory=dict[str, Any])
    large: Mapping[str, Any] = field(default_factory=lambda: {"d_in": 32, "d_sae": 512})
    reconstruction_alone: Mapping[str, Any] = field(default_factory=dict[str, Any])
    own_fields: Mapping[str, Any] = field(default_factory=lambda: {"dead_latent_loss": "auxk"})
    own_files: Set[str] = frozenset()
    takes_plain_rows_only: bool = False


def jumprelu_inputs(
    stock: Any, n_rows: int, precision: Precision, dead: torch.Tensor | None
) -> torch.Tensor:
    del dead
    with torch.no_grad():
        # Stock rounds them at use.
        stock.threshold.copy_(stock.threshold.bfloat16())
    return decided_inputs(stock, n_rows, precision)


TRAITS = {
    "topk_sparse": Traits(
        options=TOPK_OPTIONS,
        few_options=ALL_OR_NO_OPTIONS,
        make_stock=make_stock,
        inputs=lambda stock, n_rows, _, dead: zipf_inputs(stock, n_rows, dead),
        # From 32 latents per selected one on.
        screened={"d_in": 13, "d_sae": 64, "k": 2},
        large={"d_in": 32, "d_sae": 512, "k": 16},
    ),
    "batchtopk_sparse": Traits(
        options=TOPK_OPTIONS,
        few_options=ALL_OR_NO_OPTIONS,
        # Its search has tests of its own there, and what follows it is Top-K's.
        steps_interpreted=False,
        inputs=lambda stock, n_rows, _, dead: rows_for_batch_topk(stock, n_rows, dead),
        screened={"d_in": 13, "d_sae": 64, "k": 2.3},
        large={"d_in": 32, "d_sae": 512, "k": 16},
    ),
    "matryoshka_batchtopk_sparse": Traits(
        options=MATRYOSHKA_OPTIONS,
        few_options=TWO_MATRYOSHKA_OPTIONS,
        steps_interpreted=False,
        make_stock=make_matryoshka,
        inputs=lambda stock, n_rows, _, dead: matryoshka_inputs(stock, n_rows, dead),
        screened={"d_in": 13, "d_sae": 64, "k": 2.3},
        large={"d_in": 32, "d_sae": 512, "k": 16},
        takes_plain_rows_only=True,
    ),
    "jumprelu_sparse": Traits(
        options=OPTIONS,
        few_options=THREE_OPTIONS,
        paths=PATHS,
        steps_interpreted=False,
        make_stock=make_jumprelu,
        inputs=jumprelu_inputs,
        fields=lambda target, precision: {
            "d_sae": 20 if target.interpreted else D_SAE_OF_JUMPRELU,
            "jumprelu_bandwidth": bandwidth_of(precision),
            "pre_act_loss_coefficient": 0.3,
        },
        reconstruction_alone={"l0_coefficient": 0.0, "pre_act_loss_coefficient": None},
        own_fields={"dead_latent_loss": None, "aux_loss_coefficient": 1.0},
        own_files={"saelens_sparse_state.json"},
    ),
}


@dataclass(frozen=True)
class Subject:
    """A sparse architecture on one of its paths.

    Attributes:
        name: of the architecture.
        target: what the sparse SAE computes with, and where it and stock are.
    """

    name: str
    target: Target

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.name]

    @property
    def infers_as_it_trains(self) -> bool:
        """Whether the saved SAE computes what the trained one does."""
        return self.architecture.inference_config.architecture() == self.architecture.stock

    @property
    def traits(self) -> Traits:
        return TRAITS.get(self.name, Traits())

    def stock(self, precision: Precision = FLOAT32, **cfg: Any) -> Any:
        """A stock SAE with random weights from the global generator."""
        traits = self.traits
        cfg = {**traits.fields(self.target, precision), **cfg}
        if traits.make_stock is not None:
            return traits.make_stock(dtype=precision.dtype, device=self.target.device, **cfg)
        settings: dict[str, Any] = {
            "d_in": 12,
            "d_sae": 48,
            "dtype": str(precision.dtype).removeprefix("torch."),
            "device": self.target.device,
        }
        if self.architecture.sparsity_field is not None:
            settings[self.architecture.sparsity_field] = 5
        stock = self.architecture.stock_sae(self.architecture.stock_config(**{**settings, **cfg}))
        randomize(stock)
        return stock

    def sparse(self, stock: Any, implementation: str | None = None, **changes: Any) -> Any:
        """A sparse SAE like `stock`, by the path's implementation unless told otherwise."""
        return sparse_like(stock, implementation or self.target.backend, **changes)

    def inputs(
        self,
        stock: Any,
        n_rows: int,
        precision: Precision = FLOAT32,
        dead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in `Traits`."""
        return self.traits.inputs(stock, n_rows, precision, dead)

    def case(
        self, precision: Precision = FLOAT32, n_rows: int = 40, **cfg: Any
    ) -> tuple[Any, torch.Tensor]:
        """A stock SAE and its inputs, fewer in Triton's interpreter."""
        stock = self.stock(precision, **cfg)
        return stock, self.inputs(stock, self.target.few_rows(n_rows), precision)


# On a path that every machine has.
SUBJECTS = {name: Subject(name, TARGETS["torch-cpu"]) for name in ARCHITECTURES}


def subjects(
    where: Set[str] | None = None,
    *,
    precisions: Sequence[Precision] = (),
    options: Literal["all", "few", "centred or not"] | None = None,
    any_input: bool = False,
) -> pytest.MarkDecorator:
    """Runs a test for every registered architecture, on each of its paths that runs here.

    Args:
        where: names of paths; if None, all on which a step takes less than seconds.
        precisions: the test also takes a `precision`, each that a path takes.
        options: the test also takes `options`, each of its architecture.
        any_input: leave out architectures whose stock trains on plain rows only.
    """
    names = ["subject", *["precision"] * bool(precisions), *["options"] * bool(options)]
    parameters: list[Any] = []
    for name, subject in SUBJECTS.items():
        traits, stock = subject.traits, subject.architecture.stock
        if any_input and traits.takes_plain_rows_only:
            continue
        for path, target in traits.paths.items():
            fast = traits.steps_interpreted or not target.interpreted
            if not target.runs_here or not (fast if where is None else path in where):
                continue
            axes: list[Mapping[str, Any]] = [{f"{stock}-{path}": Subject(name, target)}]
            if precisions:
                axes.append({one.name: one for one in precisions if runs(target, one)})
            if options is not None:
                few = traits.few_options if options == "few" else CENTRED_OR_NOT
                axes.append(traits.options if options == "all" else few)
            for chosen in itertools.product(*(axis.items() for axis in axes)):
                ids, values = zip(*chosen, strict=True)
                parameters.append(pytest.param(*values, id="-".join(ids), marks=marks(target)))
    return pytest.mark.parametrize(names, parameters)


architectures = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
