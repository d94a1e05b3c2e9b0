"""Activation stores over tiny models and datasets, and what a store gives, action by action."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel
from typing_extensions import override

from saelens_sparse import FastActivationsStore
from tests.support.activation_data import (
    BOS,
    CONTEXT,
    DATA,
    EOS,
    N_ROWS,
    PROMPTS,
    SEP,
    VOCABULARY,
    Int32,
    tiny_tokenizer,
    token_rows,
)
from tests.support.runs import runner_config

D_MODEL, D_HEAD, BUFFER_PROMPTS, BATCH = 16, 8, 12, 16
HOOK = "blocks.1.hook_resid_pre"
# What libraries say about themselves, and PyTorch about how SAELens copies a row.
NOT_COMPARED = ("sourceTensor", "HookedTransformer is deprecated", "eterministic")


def tiny_model(
    dtype: torch.dtype = torch.float32, device: str = "cpu", *, prepends_bos: bool = False
) -> HookedSAETransformer:
    """Two layers of random weights, which depend on nothing but the dtype."""
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_ctx=2 * CONTEXT, d_head=D_HEAD, n_heads=2, d_mlp=32,
        act_fn="gelu", d_vocab=VOCABULARY, seed=0, device=device,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedSAETransformer(cfg).to(dtype)
    model.tokenizer = tiny_tokenizer(prepends_bos=prepends_bos)
    model.cfg.tokenizer_prepends_bos = prepends_bos  # `set_tokenizer` would look at the hub
    return model


def tiny_transformers_model() -> HookedProxyLM:
    torch.manual_seed(0)
    cfg = GPT2Config(
        vocab_size=VOCABULARY, n_positions=2 * CONTEXT, n_embd=D_MODEL, n_layer=2, n_head=2,
        bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return HookedProxyLM(GPT2LMHeadModel(cfg).eval(), tiny_tokenizer())


class Models(dict[str, Any]):
    """By name."""

    @override
    def __repr__(self) -> str:
        return "Models()"  # models are long


def tiny_models() -> Models:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return Models(
        {str(dtype).removeprefix("torch."): tiny_model(dtype) for dtype in dtypes}
        | {
            "prepends BOS": tiny_model(prepends_bos=True),
            "transformers": tiny_transformers_model(),
        }
    )


Store = TypeVar("Store", bound=ActivationsStore)


@dataclass(frozen=True)
class Case:
    """A store's dataset, by its name in `DATA`, and options of the runner's config.

    With `hooks`, those of a store of several hooks.
    """

    data: str = "int64"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    hooks: tuple[str, ...] = ()
    model: str = "float32"


def case(
    data: str = "int64", *, hooks: Sequence[str] = (), model: str = "float32", **options: Any
) -> Case:
    return Case(data, options, tuple(hooks), model)


Z, POST = "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"
D_IN = {Z: 2 * D_HEAD, POST: 32}
CACHED: dict[str, Any] = {"use_cached_activations": True}
# With other options, or not at all.
NOT_AS_THEY_ARE = ("chat", "conversations, streaming", "a row too short", "one row", "many rows")
CASES: dict[str, Case] = {
    **{data: case(data) for data in DATA if data not in NOT_AS_THEY_ARE},
    "no BOS": case("text", prepend_bos=False),
    "eos": case("text", sequence_separator_token="eos"),
    "sep": case("text", sequence_separator_token="sep"),
    "no separator": case("text", sequence_separator_token=None),
    "no separator, no BOS": case("text", sequence_separator_token=None, prepend_bos=False),
    "a token as separator": case("text", sequence_separator_token=7, prepend_bos=False),
    "not concatenated": case("text", disable_concat_sequences=True),
    "not concatenated, no BOS": case("text", disable_concat_sequences=True, prepend_bos=False),
    "chat": case("chat", use_chat_formatting=True),
    "chat, not concatenated": case(
        "conversations, streaming", use_chat_formatting=True, disable_concat_sequences=True
    ),
    "chat of text": case("text", use_chat_formatting=True, sequence_separator_token="eos"),
    "special tokens excluded": case("special tokens", exclude_special_tokens=True),
    "listed tokens excluded": case(exclude_special_tokens=[5, 6, 7, 8, 49]),
    "special tokens of a text excluded": case("text", exclude_special_tokens=True),
    "all tokens excluded": case(exclude_special_tokens=[*range(BOS, 35)]),
    "positions": case(seqpos_slice=(2, 7)),
    "positions with a step": case("text", seqpos_slice=(1, -1, 2), exclude_special_tokens=True),
    "a head": case(hook_name=Z, hook_head_index=1, d_in=D_HEAD),
    "all heads": case("text", hook_name=Z, d_in=2 * D_HEAD),
    "all heads, positions": case(hook_name=Z, d_in=2 * D_HEAD, seqpos_slice=(None, None, 3)),
    "the last layer's norm": case(hook_name="ln_final.hook_normalized"),
    "the embedding": case(hook_name="hook_embed"),
    "no mixing": case(activations_mixing_fraction=0.0),
    "no mixing, text": case("text", activations_mixing_fraction=0.0, train_batch_size_tokens=20),
    "little mixing": case(activations_mixing_fraction=0.25),
    "a fraction of a row": case(activations_mixing_fraction=0.35, train_batch_size_tokens=9),
    "all is kept": case(activations_mixing_fraction=1.0),
    "all is kept, large batches": case(
        activations_mixing_fraction=1.0, train_batch_size_tokens=40
    ),
    "batch does not divide the buffer": case("text", train_batch_size_tokens=17),
    "batch of the buffer": case(train_batch_size_tokens=BUFFER_PROMPTS * CONTEXT),
    "batch of one": case("special tokens", train_batch_size_tokens=1, exclude_special_tokens=True),
    "model batch larger than the buffer": case(n_batches_in_buffer=3, store_batch_size_prompts=7),
    "model batch larger than the buffer, no mixing": case(
        n_batches_in_buffer=3, store_batch_size_prompts=7, activations_mixing_fraction=0.0
    ),
    "model batch of the buffer": case(store_batch_size_prompts=BUFFER_PROMPTS),
    "model batch larger than the dataset": case(store_batch_size_prompts=N_ROWS + 1),
    "model batch of one": case("text", store_batch_size_prompts=1),
    "bfloat16 model": case(model="bfloat16"),
    "bfloat16": case("text", model="bfloat16", dtype="bfloat16"),
    "float64 model": case(model="float64", dtype="float64"),
    "tokenizer that prepends BOS": case("text", model="prepends BOS"),
    "model of transformers": case("text", model="transformers", hook_name="transformer.h.0"),
    "autocast": case(autocast_lm=True),
    "options of the model": case(model_kwargs={"return_type": None}),
    "hooks": case(hooks=(HOOK, Z, POST)),
    "hooks, text": case(
        "text", hooks=(POST, HOOK), exclude_special_tokens=True, train_batch_size_tokens=17
    ),
    "hooks, positions": case("streaming", hooks=(HOOK, Z), seqpos_slice=(1, None, 2)),
    "hooks, bfloat16": case(hooks=(HOOK, POST), model="bfloat16", activations_mixing_fraction=1.0),
    "hooks, autocast": case(hooks=("hook_embed", POST), autocast_lm=True),
    "hooks of transformers": case(
        "text", hooks=("transformer.h.1", "transformer.h.0"), model="transformers"
    ),
    "hooks, a head": case("shuffled", hooks=(Z, HOOK), hook_head_indices={Z: 0}),
    "one of the hooks": case("long rows", hooks=(HOOK,), activations_mixing_fraction=0.0),
    "cached": case(**CACHED),
    "cached, float64": case(**CACHED, dtype="float64", train_batch_size_tokens=17),
    "cached, no mixing": case(
        **CACHED, activations_mixing_fraction=0.0, store_batch_size_prompts=5
    ),
    "cached, fewer than the buffer": case(**CACHED, n_batches_in_buffer=30),
    "cached, tokens excluded": case(**CACHED, exclude_special_tokens=True),
}  # fmt: skip


def cached_activations(folder: Path) -> str:
    """In SAELens's format."""
    generator = torch.Generator().manual_seed(2)
    acts = torch.randn(N_ROWS, CONTEXT, D_MODEL, generator=generator)
    Dataset.from_dict(
        {HOOK: acts.numpy(), "token_ids": token_rows()},
        features=datasets.Features(
            {
                HOOK: datasets.Array2D((CONTEXT, D_MODEL), "float32"),
                "token_ids": datasets.List(Int32, length=CONTEXT),
            }
        ),
    ).save_to_disk(folder)
    return str(folder)


def settings_of(case: Case, folder: Path) -> dict[str, Any]:
    """Options of a runner's config."""
    settings: dict[str, Any] = {
        "hook_name": HOOK,
        "context_size": CONTEXT,
        "store_batch_size_prompts": PROMPTS,
        "train_batch_size_tokens": BATCH,
        "n_batches_in_buffer": BUFFER_PROMPTS,
        "training_tokens": 45 * BATCH,
        **case.options,
    }
    settings.pop("d_in", None)
    if settings.get("use_chat_formatting"):
        settings["is_dataset_tokenized"] = False
    if settings.get("use_cached_activations"):
        settings["cached_activations_path"] = cached_activations(folder / "cached")
    return settings


def make_store(store_class: type[Store], case: Case, model: Any, folder: Path) -> Store:
    """A store as SAELens's runners make it.

    Args:
        store_class: SAELens's or a subclass.
        case: What the store is made of.
        model: Makes the activations.
        folder: A new one, for files of the dataset.
    """
    (folder / "data").mkdir(parents=True)
    data = DATA[case.data](folder / "data")
    settings = settings_of(case, folder)
    if case.hooks:
        several = several_hooks(store_class, case, settings, data, model)
        assert isinstance(several, store_class)
        return several
    sae = TopKTrainingSAEConfig(d_in=case.options.get("d_in", D_MODEL), d_sae=32, k=4)
    cfg = runner_config(sae, folder, **settings)
    if isinstance(data, str):
        cfg.dataset_path, data = data, None
    store = store_class.from_config(model, cfg, override_dataset=data)
    assert isinstance(store, store_class)
    return store


def several_hooks(
    store_class: type[ActivationsStore],
    case: Case,
    settings: dict[str, Any],
    data: Any,
    model: Any,
) -> ActivationsStore:
    of_runner = ("hook_name", "is_dataset_tokenized")
    options = {name: value for name, value in settings.items() if name not in of_runner}
    device = options.pop("act_store_device", options.get("device", "cpu"))
    options["device"] = device
    options["total_training_tokens"] = options.pop("training_tokens")
    excluded = options.pop("exclude_special_tokens", False)
    if excluded:
        excluded = [BOS, EOS, SEP] if excluded is True else excluded
        options["exclude_special_tokens"] = torch.tensor(excluded, device=device)
    heads = options.get("hook_head_indices", {})
    return store_class.from_config_multi_hook(
        model,
        dataset=data,
        hook_names=list(case.hooks),
        hook_d_ins={h: D_HEAD if h in heads else D_IN.get(h, D_MODEL) for h in case.hooks},
        **options,
    )


TRAINING = ["batch"] * 30
# Evals take tokens of any number between two batches.
WITH_EVALS = [
    *("tokens 3", "batch", "batch", "tokens", "tokens 9", "reset", "tokens 2", *["batch"] * 5),
    *("unmoved tokens", "batch", "raw", "batch", "filtered", "epoch's tokens", *["batch"] * 3),
    *["epoch's tokens"] * 7,
    *["batch"] * 5,
    *("tokens 30", *["batch"] * 8),
]


@dataclass(frozen=True)
class Event:
    """What an action on a store gave, and what it left behind."""

    action: str
    result: Any
    warned: list[str]
    n_dataset_processed: int
    random_state: torch.Tensor


# Of a fixture: what SAELens's store says and gives, by its case's name and actions.
PlayStock = Callable[[str, Sequence[str]], tuple[list[str], list[Event]]]


def tensors_of(result: Any) -> dict[str, torch.Tensor | None]:
    if isinstance(result, dict):
        return result
    parts = result if isinstance(result, tuple) else (result,)
    return {str(index): part for index, part in enumerate(parts)}


class Player:
    """Acts on a store, and notes what it gives.

    An action is "batch", "raw" or "filtered" for what training takes, "tokens" for what evals
    take, with a number of prompts after a space, or "epoch's tokens", "unmoved tokens". "reset" and
    "shuffle" are done to the dataset; "draw" is what others do with PyTorch's generator.
    """

    def __init__(self, store: ActivationsStore) -> None:
        self.store = store
        self.events: list[Event] = []
        self.batches: Iterator[Any] = store
        if isinstance(store, FastActivationsStore) and store.reads_ahead:
            self.batches = store.hook_batches() if store._hook_names else store
        elif store._hook_names:
            self.batches = store.get_multi_hook_data_loader()

    def act(self, action: str) -> Any:
        store, (name, *number) = self.store, action.split(" ")
        match name:
            case "batch":
                return next(self.batches)
            case "tokens":
                return store.get_batch_tokens(int(number[0]) if number else None)
            case "unmoved":
                return store.get_batch_tokens(move_to_model_device=False)
            case "epoch's":
                return store.get_batch_tokens(raise_at_epoch_end=True)
            case "raw":
                return store.get_raw_llm_batch()
            case "filtered":
                return store.get_filtered_llm_batch()
            case "shuffle":
                return store.shuffle_input_dataset(seed=3, buffer_size=4)
            case "draw":
                return torch.rand(3)
            case "reset":
                return store.reset_input_dataset()
            case _:
                raise AssertionError(action)

    def play(self, actions: Sequence[str]) -> list[Event]:
        """Notes results without copying them, as a caller may keep batches."""
        for action in actions:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    result = self.act(action)
                except Exception as error:
                    # Of other errors, only that there is one: messages may differ.
                    result = "the end" if isinstance(error, StopIteration) else "an error"
            position, random_state = self.store.n_dataset_processed, torch.get_rng_state()
            self.events.append(Event(action, result, what_was_said(caught), position, random_state))
        return self.events


def what_was_said(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    messages = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    return [said for said in messages if not any(words in said for words in NOT_COMPARED)]


def play(
    store_class: type[ActivationsStore],
    case: Case,
    actions: Sequence[str],
    model: Any,
    folder: Path,
) -> tuple[list[str], list[Event]]:
    """What a new store says when it is made, and what actions on it give."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = make_store(store_class, case, model, folder)
    return what_was_said(caught), Player(store).play(actions)


def assert_same_events(
    own: Sequence[Event], stock: Sequence[Event], *, positions: bool = True
) -> None:
    """Bit for bit, dtype and device included.

    Args:
        own: Of this package's store.
        stock: Of SAELens's.
        positions: Whether positions in the dataset are the same, too.
    """
    assert len(own) == len(stock)
    for index, (one, other) in enumerate(zip(own, stock, strict=True)):
        where = f"{index}: {other.action}"
        if isinstance(other.result, str | None):
            assert one.result == other.result, where
        else:
            assert_same_tensors(one.result, other.result, where)
        assert one.warned == other.warned, where
        assert not positions or one.n_dataset_processed == other.n_dataset_processed, where
        assert torch.equal(one.random_state, other.random_state), f"{where}: the random state"


def assert_same_tensors(own: Any, stock: Any, where: str) -> None:
    assert not isinstance(own, str), f"{where}: {own}"
    assert type(own) is type(stock), where
    tensors, others = tensors_of(own), tensors_of(stock)
    assert list(tensors) == list(others), where
    for name, other in others.items():
        tensor = tensors[name]
        if other is None:
            assert tensor is None
            continue
        assert tensor is not None, where
        assert (tensor.dtype, tensor.device) == (other.dtype, other.device), where
        assert tensor.requires_grad == other.requires_grad, where
        assert tensor.shape == other.shape, where
        assert torch.equal(tensor, other), f"{where}: values of {name}"
