"""Inputs that look like a language model's activations, made from a seed on the device."""

from __future__ import annotations

import math

import torch

MAX_FEATURES = 65_536
OUTLIER_DIMENSIONS = 4
COMMON_FEATURES = 1024
"""As many are drawn row by row; the others, of which a row has few, one occurrence at a time."""


class ActivationStream:
    """
    Batches of superposed sparse features with the traits that make activations hard.

    Each row is `mean + codes @ directions + noise`: features lie along random directions and are
    present with Zipf-distributed frequencies (the commonest in every row, most in fewer than one in
    a thousand) and log-normal strengths. A few dimensions carry a large mean and variance, as in
    residual streams. The root mean square norm of rows is about sqrt(d_in), like that of
    activations normalised by SAELens.

    `codes`, `[rows, n_features]`, is never made: beyond the common features it is as good as empty.

    On one kind of device, the same `seed` gives the same directions and batches.
    """

    def __init__(
        self, d_in: int, n_features: int, features_per_row: float, device: str, seed: int = 0
    ):
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.directions = torch.nn.functional.normalize(self._randn(n_features, d_in), dim=-1)
        rank = torch.arange(1, n_features + 1, device=device)
        zipf = 1 / rank
        presence = (zipf * features_per_row / zipf.sum()).clamp(max=1.0)
        self.common_presence = presence[:COMMON_FEATURES]
        self.rare_presence = presence[COMMON_FEATURES:].double().cumsum(0)
        """Expected number in a row of the rare features up to each, in float64: differences of it
        are the probabilities."""

        outliers = torch.randperm(d_in, generator=self.generator, device=device)
        outliers = outliers[:OUTLIER_DIMENSIONS]
        self.spread = torch.ones(d_in, device=device)
        self.spread[outliers] = 4.0
        self.mean = 0.1 * self._randn(d_in)
        self.mean[outliers] = 5.0
        self.scale = 1.0
        sample = self.batch(256, index=-1)
        self.scale = math.sqrt(d_in) / sample.square().sum(-1).mean().sqrt().item()

    def batch(self, rows: int, index: int) -> torch.Tensor:
        """The `index`-th batch, float32 `[rows, d_in]`."""
        self.generator.manual_seed(self.seed * 1_000_003 + index + 2)
        n_common, d_in = len(self.common_presence), self.directions.shape[1]
        present = self._rand(rows, n_common) < self.common_presence
        codes = present * self._strengths(rows, n_common)
        superposed = codes @ self.directions[:n_common] + self._rare_features(rows)
        noise = 0.2 / math.sqrt(d_in) * self._randn(rows, d_in)
        return self.scale * (self.mean + self.spread * (superposed + noise))

    def _rare_features(self, rows: int) -> torch.Tensor | float:
        """
        The rare features' part of a batch, `[rows, d_in]`: as many occurrences as are expected,
        each in a row drawn at random. A feature that meets a row twice counts twice, which happens
        to one occurrence in hundreds at most.
        """
        if not len(self.rare_presence):
            return 0.0
        expected = self.rare_presence[-1].item()
        n = round(rows * expected)
        draws = expected * self._rand(n, dtype=torch.float64)
        features = torch.searchsorted(self.rare_presence, draws).clamp(
            max=len(self.rare_presence) - 1
        )
        in_rows = (rows * self._rand(n, dtype=torch.float64)).long().sort().values
        return torch.nn.functional.embedding_bag(
            COMMON_FEATURES + features,
            self.directions,
            torch.searchsorted(in_rows, torch.arange(rows, device=in_rows.device)),
            mode="sum",
            per_sample_weights=self._strengths(n),
        )

    def _strengths(self, *shape: int) -> torch.Tensor:
        return torch.exp(0.5 * self._randn(*shape))

    def _rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = self.generator
        return torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)
