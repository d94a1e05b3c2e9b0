"""
The activation store alone: SAELens's and this package's, with a language model that costs nothing.

The model's activations are on the device already. Token batches come from Arrow files on disk and
do not repeat. Both stores are alive in one process and take turns, each turn over whole refills of
the buffer. Before that, the first batches of both must agree bit for bit; for these the model looks
activations up by token.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sae_lens import logger
from sae_lens.training.activations_store import ActivationsStore
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from benchmarks.harness import describe, say
from benchmarks.random_data import cached_activations, token_dataset
from benchmarks.rows import DisagreementError, ResultsFile, Row
from benchmarks.wall_clock import peak_gib, profiled_ms, start_peak
from saelens_sparse.activations import FastActivationsStore
from saelens_sparse.profile.trainers import release_memory
from saelens_sparse.whole_run.clock import PER_TOKENS, now

STORES: dict[str, type[ActivationsStore]] = {
    "stock": ActivationsStore,
    "fast": FastActivationsStore,
}
HOOK = "blocks.0.hook_resid_post"
VOCABULARY, SPECIAL_TOKENS = 8192, 128
MIXING_FRACTION = 0.5  # SAELens's default
CHECKED_REFILLS, WARM_UP_REFILLS = 2.5, 2
READY_BATCHES = 4


@dataclass(frozen=True)
class StoreCase:
    """
    A store and its sizes. The model's activations are float32.

    Attributes:
        name: what it is asked for by.
        d_in: width of an activation.
        context: tokens of a prompt.
        buffer_prompts: prompts in the buffer, SAELens's `n_batches_in_buffer`.
        model_prompts: prompts of a batch of the language model.
        batch: tokens of a training batch.
        act_store_device: where the buffer is, unless on the device.
        exclude_special_tokens: whether one token in 64 is left out.
        cached: whether activations come from SAELens's cache on disk.
    """

    name: str
    d_in: int
    context: int
    buffer_prompts: int
    model_prompts: int
    batch: int = 4096
    act_store_device: str | None = None
    exclude_special_tokens: bool = False
    cached: bool = False

    @property
    def refill_batches(self) -> int:
        """Batches that one refill of the buffer gives."""
        rows = self.buffer_prompts * self.context
        return (rows - int(rows * MIXING_FRACTION)) // self.batch

    def prompts(self, refills: float) -> int:
        """More prompts than a store reads for so many refills."""
        served = refills * self.refill_batches * self.batch / self.context
        return round(1.1 * served) + 2 * self.buffer_prompts


_GPT2 = StoreCase("gpt2", d_in=768, context=128, buffer_prompts=640, model_prompts=64)
_DEMO = StoreCase(
    "demo", d_in=576, context=128, buffer_prompts=256, model_prompts=16, batch=1024,
    exclude_special_tokens=True,
)  # fmt: skip
_TINY = StoreCase("tiny", d_in=8, context=16, buffer_prompts=32, model_prompts=4, batch=64)
CASES = {
    case.name: case
    for case in (
        _GPT2,
        StoreCase("gemma2b", d_in=2304, context=1024, buffer_prompts=160, model_prompts=8),
        replace(_GPT2, name="gpt2_special_tokens", exclude_special_tokens=True),
        replace(_GPT2, name="gpt2_buffer_on_cpu", act_store_device="cpu"),
        replace(_GPT2, name="gpt2_cached", cached=True),
        _DEMO,
        replace(_DEMO, name="demo_cached", cached=True),
        _TINY,
        replace(_TINY, name="tiny_cached", exclude_special_tokens=True, cached=True),
    )
}
GROUPS = {
    "cuda": tuple(name for name in CASES if name.startswith(("gpt2", "gemma2b"))),
    "cpu": ("demo", "demo_cached"),
}
"""What is measured on a device by default."""


class FreeModel(HookedRootModule):
    """
    A language model whose activations are on the device already.

    Args:
        case: Sizes.
        device: "cuda" or "cpu".
        by_token: Activations are those of the tokens, at a lookup's cost. Otherwise prepared ones
            are given in turn, whatever the tokens are.
    """

    tokenizer = None

    @override
    def __init__(self, case: StoreCase, device: str, *, by_token: bool):
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(1, device=device), requires_grad=False)
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].hook_resid_post = HookPoint()
        self.setup()
        generator = torch.Generator(device).manual_seed(0)
        shape = (
            (VOCABULARY, case.d_in)
            if by_token
            else (READY_BATCHES, case.model_prompts, case.context, case.d_in)
        )
        self.by_token = by_token
        self.activations = torch.randn(shape, device=device, generator=generator)
        self.calls = 0

    @override
    def run_with_cache(self, tokens: torch.Tensor, **_options: Any) -> Any:
        """None for the logits, and a cache with activations `[prompts, context, d_in]`."""
        if self.by_token:
            return None, {HOOK: self.activations[tokens]}
        self.calls += 1
        return None, {HOOK: self.activations[self.calls % READY_BATCHES, : len(tokens)]}


def make_store(
    kind: type[ActivationsStore], case: StoreCase, model: FreeModel, data: Any
) -> ActivationsStore:
    """A fresh store on a data set of tokens or, of a cached case, on a folder of activations."""
    device = torch.device(case.act_store_device or model.W_E.device)
    special = torch.arange(SPECIAL_TOKENS, device=device)
    return kind(
        model=model,
        dataset=None if case.cached else data,
        cached_activations_path=str(data) if case.cached else None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=case.context,
        d_in=case.d_in,
        n_batches_in_buffer=case.buffer_prompts,
        total_training_tokens=1,
        store_batch_size_prompts=case.model_prompts,
        train_batch_size_tokens=case.batch,
        prepend_bos=False,
        normalize_activations="none",
        device=device,
        dtype="float32",
        exclude_special_tokens=special if case.exclude_special_tokens else None,
        activations_mixing_fraction=MIXING_FRACTION,
    )


def open_data(case: StoreCase, refills: float, folder: Path) -> Any:
    """What stores of the case read: enough for so many refills, as a new reader sees it."""
    prompts = case.prompts(refills)
    if case.cached:
        sizes = (prompts, case.context, case.d_in, VOCABULARY)
        return cached_activations(folder, *sizes, HOOK)
    return token_dataset(folder, prompts, case.context, VOCABULARY)


def first_batches(
    store: Iterator[torch.Tensor], n_batches: int, seed: int = 0
) -> Iterator[torch.Tensor]:
    """Copies of the first batches that a store gives from a seed on."""
    torch.manual_seed(seed)
    for _ in range(n_batches):
        yield next(store).clone()


def require_same_batches(expected: Sequence[torch.Tensor], found: Iterable[torch.Tensor]) -> None:
    """
    Raises:
        DisagreementError: A batch has another dtype, device or shape, or another bit.
    """
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=1):
        kinds = [(one.dtype, one.device, tuple(one.shape)) for one in (ours, theirs)]
        if kinds[0] != kinds[1]:
            raise DisagreementError(f"batch {number} is {kinds[0]}; SAELens's is {kinds[1]}")
        if not torch.equal(ours, theirs):
            differing = (ours != theirs).any(-1).sum().item()
            raise DisagreementError(f"batch {number}: {differing} rows are not SAELens's")


@contextmanager
def one_epoch() -> Generator[None]:
    """The end of an epoch is an error; SAELens's warnings of every run are not shown."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for usual in ("To copy construct from a tensor", "The training dataset contains fewer"):
                warnings.filterwarnings("ignore", message=usual)
            warnings.filterwarnings("error", message="All samples in the training dataset")
            yield
    finally:
        logger.setLevel(level)


def take(store: Iterator[torch.Tensor], n_batches: int, device: str) -> None:
    """Draw batches and bring them to the device, as a step of SAELens's trainer does."""
    for _ in range(n_batches):
        next(store).to(device)


def check(case: StoreCase, folder: Path, refills: float, device: str) -> int:
    """
    Compare the first batches of both stores.

    Returns:
        How many were compared.

    Raises:
        DisagreementError: Batches differ.
    """
    model = FreeModel(case, device, by_token=True)
    stock, fast = (
        make_store(kind, case, model, open_data(case, refills, folder)) for kind in STORES.values()
    )
    n_batches = round(CHECKED_REFILLS * case.refill_batches)
    require_same_batches(list(first_batches(stock, n_batches)), first_batches(fast, n_batches))
    return n_batches


def measure(case: StoreCase, folder: Path, args: Namespace) -> Iterator[Row]:
    """
    Check the stores of a case, then time them in turn; a row for each.

    Args:
        case: Sizes.
        folder: Where the data set is, or is written.
        args: The options `device`, `rounds` and `refills`.

    Raises:
        DisagreementError: Batches differ from SAELens's.
    """
    device = args.device
    # What a cache holds of a refill is hundreds of megabytes.
    refills = 1 if case.cached else args.refills
    n_batches = refills * case.refill_batches
    in_all = WARM_UP_REFILLS + (args.rounds + 1) * refills
    checked = check(case, folder, in_all, device)
    release_memory(device)

    model = FreeModel(case, device, by_token=False)
    peaks: dict[str, float | None] = {}
    running: dict[str, ActivationsStore] = {}
    for name, kind in STORES.items():
        before = start_peak(device)
        running[name] = make_store(kind, case, model, open_data(case, in_all, folder))
        take(running[name], WARM_UP_REFILLS * case.refill_batches, device)
        peaks[name] = peak_gib(device, before)

    scale = PER_TOKENS / (n_batches * case.batch)
    ms: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name, store in running.items():
            start = now(device)
            take(store, n_batches, device)
            ms[name].append(1e3 * (now(device) - start) * scale)
    for name, store in running.items():
        busy = profiled_ms(lambda store=store: take(store, n_batches, device), device)
        yield {
            "contender": name,
            "status": "ok",
            "checked_batches": checked,
            "ms": median(ms[name]),
            "ms_min": min(ms[name]),
            "ms_max": max(ms[name]),
            "busy_ms": busy and busy * scale,
            "peak_gib": peaks[name],
            "rounds": args.rounds,
            "refills": refills,
        }


def run(results: ResultsFile, cases: Iterable[StoreCase], args: Namespace) -> int:
    """
    Measure cases; returns 1 if stores of any could not be compared.

    Args:
        results: Where a row for each store of each case goes.
        cases: What to measure.
        args: The options `device`, `rounds`, `refills` and `cache`.
    """
    with tempfile.TemporaryDirectory() as temporary, one_epoch():
        for case in cases:
            key: Row = {"operation": "store", "case": case.name, "dtype": "float32"}
            key |= {name: value for name, value in asdict(case).items() if name != "name"}
            try:
                rows = list(measure(case, args.cache or Path(temporary), args))
            except Exception as error:
                rows = [{"contender": "fast", **describe(error)}]
            for row in rows:
                said = f"{row['ms']:.3f} ms" if row["status"] == "ok" else row["message"]
                say(f"{case.name} {row['contender']}: {said}")
                results.append({**key, **row})
            release_memory(args.device)
    return int(any(row["status"] != "ok" for row in results.rows))
