"""A tokenizer, and datasets of each kind that an activation store reads."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

CONTEXT, VOCABULARY = 8, 50
N_ROWS, PROMPTS = 23, 4
BOS, EOS, SEP = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} <eos> {% endfor %}"
)


def tiny_tokenizer(*, prepends_bos: bool = False) -> PreTrainedTokenizerFast:
    """Words "w5" and so on are tokens; others are "w5"."""
    words = {"<bos>": BOS, "<eos>": EOS, "<sep>": SEP, "user": 3, "assistant": 4}
    words |= {f"w{i}": i for i in range(5, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w5"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if prepends_bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", sep_token="<sep>",
        pad_token="<eos>",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_rows(length: int = CONTEXT, n_rows: int = N_ROWS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (n_rows, length), generator=generator).tolist()


def words(row: Sequence[int]) -> str:
    names = {BOS: "<bos>", EOS: "<eos>", SEP: "<sep>", 3: "user", 4: "assistant"}
    return " ".join(names.get(token, f"w{token}") for token in row)


def texts() -> list[str]:
    """Longer and shorter than the context, one as long, empty ones, some that begin with BOS."""
    lengths = 2 * [3, 11, 0, 8, 1, 20, 7, 9, 0, 2, 33, 5, 8, 16, 4, 6, 7, 12, 1, 1, 10]
    rows = [row[:length] for row, length in zip(token_rows(40, 42), lengths, strict=True)]
    for index in (1, 3, 4, 6, 7, 25):
        rows[index][0] = BOS
    return [words(row) for row in rows]


def conversations() -> list[list[dict[str, str]]]:
    rows = token_rows(9, n_rows=14)
    return [
        [
            {"role": "user", "content": words(row[: 1 + index % 9])},
            {"role": "assistant", "content": words(row[index % 4 :])},
        ]
        for index, row in enumerate(rows)
    ]


def typed(feature: Any, rows: list[list[int]] | None = None, column: str = "input_ids") -> Dataset:
    return Dataset.from_dict(
        {column: token_rows() if rows is None else rows},
        features=datasets.Features({column: feature}),
    )


def in_chunks(folder: Path) -> Dataset:
    """On disk, in tables of several sizes."""
    rows, parts = token_rows(), []
    for index, (start, end) in enumerate([(0, 5), (5, 6), (6, 20), (20, N_ROWS)]):
        Dataset.from_dict({"input_ids": rows[start:end]}).save_to_disk(folder / str(index))
        parts.append(datasets.load_from_disk(folder / str(index)))
    return datasets.concatenate_datasets(parts)


def generated() -> IterableDataset:
    def rows() -> Iterator[dict[str, list[int]]]:
        for row in token_rows(CONTEXT + 1):
            yield {"tokens": row}

    return IterableDataset.from_generator(rows)


def text_in_a_folder(folder: Path) -> str:
    Dataset.from_dict({"text": texts()}).to_json(folder / "train.jsonl")
    return str(folder)


def special_rows() -> list[list[int]]:
    """Some of a model batch's rows, and all rows of two model batches, are special tokens."""
    rows = token_rows()
    for index in (1, 2, *range(PROMPTS, 2 * PROMPTS), *range(4 * PROMPTS, 5 * PROMPTS)):
        rows[index] = [BOS, EOS, SEP, EOS, EOS, BOS, SEP, EOS]
    return rows


Int32 = datasets.Value("int32")
# Makes a dataset, or names one; the argument is an empty folder.
DATA: dict[str, Callable[[Path], Any]] = {
    "int64": lambda _: Dataset.from_dict({"input_ids": token_rows()}),
    "int32": lambda _: typed(datasets.List(Int32)),
    "large list": lambda _: typed(datasets.LargeList(Int32)),
    "fixed-size list": lambda _: typed(datasets.List(Int32, length=CONTEXT)),
    "uint16": lambda _: typed(datasets.List(datasets.Value("uint16"))),
    "float64": lambda _: typed(datasets.List(datasets.Value("float64"))),
    "tokens": lambda _: Dataset.from_dict(
        {"text": ["w5"] * N_ROWS, "tokens": token_rows(), "n": [1.0] * N_ROWS}
    ),
    "long rows": lambda _: typed(datasets.List(Int32), token_rows(CONTEXT + 3), "tokens"),
    "long fixed-size rows": lambda _: typed(
        datasets.List(Int32, length=CONTEXT + 3), token_rows(CONTEXT + 3)
    ),
    "rows of several lengths": lambda _: Dataset.from_dict(
        {"input_ids": [row[: CONTEXT + i * i % 7] for i, row in enumerate(token_rows(16))]}
    ),
    "shuffled": lambda _: Dataset.from_dict({"input_ids": token_rows()}).shuffle(seed=3),
    "selected": lambda _: Dataset.from_dict({"input_ids": token_rows()}).select(
        [22, 3, 3, 4, 5, 19, 0, 1, 2, 11, 10, 9]
    ),
    "a range": lambda _: typed(datasets.List(Int32, length=CONTEXT)).select(range(3, 20)),
    "chunks on disk": in_chunks,
    "one row": lambda _: Dataset.from_dict({"input_ids": token_rows(n_rows=1)}),
    "many rows": lambda _: Dataset.from_dict({"input_ids": token_rows(n_rows=200)}),
    "special tokens": lambda _: Dataset.from_dict({"input_ids": special_rows()}),
    "a row too short": lambda _: Dataset.from_dict(
        {"input_ids": [*token_rows()[:20], token_rows()[20][:-1]]}
    ),
    "streaming": lambda _: Dataset.from_dict({"input_ids": token_rows()}).to_iterable_dataset(
        num_shards=3
    ),
    "streaming, shuffled": lambda _: Dataset.from_dict({"input_ids": token_rows()})
    .to_iterable_dataset(num_shards=3)
    .shuffle(seed=4, buffer_size=5),
    "streaming, generated": lambda _: generated(),
    "streaming, tensors": lambda _: Dataset.from_dict({"input_ids": token_rows()})
    .to_iterable_dataset()
    .with_format("torch"),
    "arrays": lambda _: Dataset.from_dict({"input_ids": token_rows()}).with_format("numpy"),
    "a list": lambda _: [{"tokens": row} for row in token_rows()],
    "text": lambda _: Dataset.from_dict({"text": texts()}),
    "problem": lambda _: Dataset.from_dict({"problem": texts()}),
    "text, streaming": lambda _: Dataset.from_dict({"text": texts()}).to_iterable_dataset(),
    "text, shuffled": lambda _: Dataset.from_dict({"text": texts()}).shuffle(seed=3),
    "text in a folder": text_in_a_folder,
    "short texts": lambda _: Dataset.from_dict({"text": ["w5 w6", "w7"] * 20}),
    "chat": lambda _: Dataset.from_dict({"messages": conversations()}),
    "conversations, streaming": lambda _: Dataset.from_dict(
        {"conversations": conversations()}
    ).to_iterable_dataset(),
}  # fmt: skip
