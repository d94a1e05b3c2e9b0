"""Caches that are measured, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.language_models import LLAMA_OF_GEMMA2_SHAPE, ModelShape
from saelens_sparse.activations.shards.manifest import DTYPE_NAMES


@dataclass(frozen=True)
class CacheCase:
    """
    A cache and an SAE that is trained from it.

    Attributes:
        name: what it is asked for by.
        d_in: width of an activation.
        d_sae: number of latents.
        k: active latents.
        context: tokens of a prompt.
        model_prompts: prompts of a batch of the language model.
        buffer_prompts: prompts in the buffer.
        batch: tokens of a training batch.
        dtype: of the cache.
        gib: its size.
        shard_bytes: size of a shard.
        n_batches: batches that are read at a time.
        saelens_prompts: rows of the cache in SAELens's format, which is float32.
        window: steps of a timed window.
        shape: of the language model whose speed stands beside that of writing.
    """

    name: str
    d_in: int
    d_sae: int
    k: int
    context: int
    model_prompts: int
    buffer_prompts: int
    batch: int
    dtype: str
    gib: float
    shard_bytes: int
    n_batches: int
    saelens_prompts: int
    window: int
    shape: ModelShape

    @property
    def model_rows(self) -> int:
        return self.model_prompts * self.context

    @property
    def rows(self) -> int:
        row_bytes = self.d_in * DTYPE_NAMES[self.dtype].itemsize
        return round(self.gib * 2**30 / row_bytes / self.model_rows) * self.model_rows


_GEMMA2B = CacheCase(
    "gemma2b", 2304, 65_536, 64, context=1024, model_prompts=8, buffer_prompts=80, batch=4096,
    dtype="float16", gib=8, shard_bytes=2**30, n_batches=100, saelens_prompts=256, window=40,
    shape=LLAMA_OF_GEMMA2_SHAPE,
)  # fmt: skip
CASES = {
    case.name: case
    for case in (
        _GEMMA2B,
        replace(_GEMMA2B, name="gemma2b_float32", dtype="float32"),
        CacheCase(
            "cpu", 576, 8192, 32, context=128, model_prompts=16, buffer_prompts=160, batch=1024,
            dtype="float16", gib=1 / 4, shard_bytes=2**26, n_batches=50, saelens_prompts=512,
            window=5, shape=LLAMA_OF_GEMMA2_SHAPE.tiny,
        ),
        CacheCase(
            "tiny", 16, 64, 4, context=16, model_prompts=4, buffer_prompts=32, batch=64,
            dtype="float16", gib=2**-13, shard_bytes=2**15, n_batches=10, saelens_prompts=64,
            window=2, shape=LLAMA_OF_GEMMA2_SHAPE.tiny,
        ),
    )
}  # fmt: skip
DEFAULT_CASES = {"cuda": ["gemma2b"], "cpu": ["cpu"]}
