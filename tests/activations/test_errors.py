"""What cannot work is said in one line, before the model is loaded where that can be known."""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import GPT2Config

from saelens_sparse import FastActivationsStore
from saelens_sparse.activations.rows import TokenSlices
from tests.support.activation_data import CONTEXT, DATA, VOCABULARY, token_rows
from tests.support.activation_runs import RUNNERS, Scenario, make_config, make_runner
from tests.support.activations import (
    BUFFER_PROMPTS,
    CASES,
    HOOK,
    POST,
    Models,
    cached_activations,
    case,
    make_store,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
ONE, SEVERAL = Scenario("int64"), Scenario("int64", hooks=(HOOK, POST))
scenarios = pytest.mark.parametrize("scenario", [ONE, SEVERAL], ids=["a hook", "hooks"])
# A runner that has no model to load: what fails did so before.
NO_MODEL: dict[str, Any] = {"model_name": "there is none"}


def one_line(match: str) -> AbstractContextManager[Any]:
    return pytest.raises(ValueError, match=rf"\A[^\n]*(?:{match})[^\n]*\Z")


def start(scenario: Scenario, folder: Path, dataset: Any = None, **options: Any) -> Any:
    """A runner without a model."""
    cfg = make_config(scenario, folder, **NO_MODEL | options)
    return RUNNERS["own"][bool(scenario.hooks)](cfg, override_dataset=dataset)


@scenarios
def test_a_buffer_smaller_than_a_batch(models: Models, scenario: Scenario, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_batches_in_buffer": 4, "seqpos_slice": (1, None)}
    options |= {"train_batch_size_tokens": 100}  # 7 activations of a prompt
    dataset = DATA["many rows"](tmp_path)
    with one_line(r"n_batches_in_buffer.*\b15\b") as raised:
        start(scenario, tmp_path, dataset, **options)
    assert "100" in str(raised.value)
    with one_line(r"n_batches_in_buffer.*\b15\b"):
        make_runner(scenario, models["float32"], tmp_path / "swapped", kind="swapped", **options)
    options["n_batches_in_buffer"] = 15
    runner = make_runner(scenario, models["float32"], tmp_path / "enough", **options)
    store = runner.activations_store
    next(store.hook_batches() if scenario.hooks else store)


def test_saelens_default_buffer_at_its_default_batch(tmp_path: Path) -> None:
    with one_line(r"n_batches_in_buffer.*\b32\b"):
        start(ONE, tmp_path, context_size=128, n_batches_in_buffer=20, train_batch_size_tokens=4096)


@scenarios
def test_a_dataset_too_small_for_a_buffer(
    models: Models, scenario: Scenario, tmp_path: Path
) -> None:
    n = BUFFER_PROMPTS - 1
    small = Dataset.from_dict({"input_ids": token_rows(n_rows=n)})
    with one_line(rf"\b{n} prompts.*\b{BUFFER_PROMPTS}\b"):
        start(scenario, tmp_path, small)
    small_scenario = Scenario("one row", hooks=scenario.hooks)
    with one_line("too few"):
        make_runner(small_scenario, models["float32"], tmp_path / "swapped", kind="swapped")
    enough = Dataset.from_dict({"input_ids": token_rows(n_rows=n + 1)})
    with pytest.raises(Exception, match="there is none"):
        start(scenario, tmp_path, enough)


@pytest.mark.parametrize("data", ["one row", "streaming", "text, streaming", "text"])
@pytest.mark.parametrize("hooks", [(), (HOOK, POST)], ids=["a hook", "hooks"])
def test_a_stream_too_small_for_a_buffer(
    models: Models, data: str, hooks: tuple[str, ...], tmp_path: Path
) -> None:
    """Which shows at its end."""
    store = make_store(
        FastActivationsStore, case(data, hooks=hooks, n_batches_in_buffer=200),
        models["float32"], tmp_path / "store",
    )  # fmt: skip
    with one_line("too few.*200"):
        next(store.get_multi_hook_data_loader() if hooks else store)


def test_texts_that_are_all_too_short(models: Models, tmp_path: Path) -> None:
    short = case("short texts", disable_concat_sequences=True)
    store = make_store(FastActivationsStore, short, models["float32"], tmp_path / "store")
    with one_line("dataset"):
        next(store)


def test_a_cache_with_less_than_a_model_batch(models: Models, tmp_path: Path) -> None:
    """With less than the buffer it is read again, as in SAELens."""
    path = cached_activations(tmp_path / "cached")
    options = {"use_cached_activations": True, "cached_activations_path": path}
    too_many: dict[str, Any] = {"store_batch_size_prompts": 24, "n_batches_in_buffer": 24}
    with one_line("cached_activations_path.*fewer than store_batch_size_prompts, 24"):
        start(ONE, tmp_path, **options, **too_many)
    store = make_store(
        FastActivationsStore, case(**CASES["cached"].options, **too_many),
        models["float32"], tmp_path / "store",
    )  # fmt: skip
    with one_line("cached_activations_path.*fewer than store_batch_size_prompts, 24"):
        next(store)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("blocks.1.hook_resid_pree", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_z", "blocks.1.attn.hook_z"),
        ("blocks.7.hook_resid_pre", "hook_resid_pre"),
    ],
)
@pytest.mark.parametrize("kind", ["own", "swapped"])
def test_an_unknown_hook(models: Models, name: str, meant: str, kind: str, tmp_path: Path) -> None:
    with one_line(f"{re.escape(name)}.*did you mean .*{re.escape(meant)}"):
        make_runner(ONE, models["float32"], tmp_path / "one", kind=kind, hook_name=name)
    with one_line(f"{re.escape(name)}.*did you mean"):
        make_runner(
            SEVERAL, models["float32"], tmp_path / "several", kind=kind,
            hook_names={HOOK: HOOK, POST: name},
        )  # fmt: skip


def test_an_unknown_hook_of_a_model_whose_weights_are_not_there(tmp_path: Path) -> None:
    GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    options = {"model_name": str(tmp_path), "model_class_name": "AutoModelForCausalLM"}
    with one_line("transformer.h.5.*did you mean transformer.h."):
        start(ONE, tmp_path, **options, hook_name="transformer.h.5")
    with pytest.raises(OSError, match="safetensors"):
        start(ONE, tmp_path, DATA["int64"](tmp_path), **options, hook_name="transformer.h.1")


@pytest.mark.parametrize("data", ["a row too short", "a row too short, streaming"])
def test_a_row_shorter_than_the_context(
    models: Models, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = DATA["a row too short"](tmp_path)
    monkeypatch.setitem(DATA, "a row too short, streaming", lambda _: short.to_iterable_dataset())
    store = make_store(FastActivationsStore, case(data), models["float32"], tmp_path / "store")
    with one_line(f"{CONTEXT - 1} tokens.*context_size, {CONTEXT}"):
        for _ in range(30):
            store.get_batch_tokens(5)


@pytest.mark.parametrize("hooks", [(), (POST, HOOK)], ids=["a hook", "hooks"])
def test_another_width_than_the_saes(
    models: Models, hooks: tuple[str, ...], tmp_path: Path
) -> None:
    elsewhere = {POST: HOOK, HOOK: "ln_final.hook_normalized"}
    options: dict[str, Any] = {"hook_names": elsewhere} if hooks else {"hook_name": POST}
    scenario = Scenario("int64", hooks=hooks)
    store = make_runner(scenario, models["float32"], tmp_path / "run", **options).activations_store
    d_in, width = (32, 16) if hooks else (16, 32)
    with one_line(rf"d_in: {d_in}\b.*\b{width}\b"):
        next(store.get_multi_hook_data_loader() if hooks else store)


def test_batches_of_hooks_need_a_store_of_hooks(models: Models, tmp_path: Path) -> None:
    store = make_store(FastActivationsStore, case(), models["float32"], tmp_path / "store")
    with pytest.raises(RuntimeError, match="from_config_multi_hook"):
        next(store.get_multi_hook_data_loader())


def test_the_row_too_short_is_named(models: Models, tmp_path: Path) -> None:
    store = make_store(
        FastActivationsStore, case("a row too short"), models["float32"], tmp_path / "store"
    )
    with one_line("row 20 "):
        for _ in range(30):
            store.get_batch_tokens(5)


@pytest.mark.parametrize(
    "rows", [[[1] * CONTEXT, None], [[1] * CONTEXT, [1, None] * CONTEXT]], ids=["row", "token"]
)
def test_nulls_are_named(rows: Any) -> None:
    slices = TokenSlices(Dataset.from_dict({"input_ids": rows}), "input_ids", CONTEXT)
    with pytest.raises(ValueError, match="row 1 has a null in 'input_ids'"):
        slices.read(0, 2)
