"""What of a screen's operands breaks its bounds; zero everywhere, if they hold."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from saelens_sparse.ops.pairs import Rows
from saelens_sparse.ops.screen import cpu as screen_cpu
from tests.support.screen_bound import Operands

GPU, ROUND, CANDIDATES, MARKS, THRESHOLD, ROWS = (
    import_module(f"saelens_sparse.ops.{name}")
    for name in ("screen.gpu", "screen.round_kernels", "search.candidate_kernels",
                 "search.mark_kernels", "search.threshold_kernels", "rows.kernels")
)  # fmt: skip


def recomputed_scores(operands: Operands) -> torch.Tensor:
    """`[n_rows, d_sae]`, each computed in float32 as that of a candidate is."""
    n_rows, d_sae = operands.x.shape[0], operands.weight.shape[0]
    latents = torch.arange(d_sae, device=operands.x.device).repeat(n_rows)
    pairs = Rows.regular(n_rows, d_sae)
    products = ROWS.gather_dot(operands.x, latents, pairs, operands.weight)
    scores = products.view(n_rows, d_sae) + operands.bias
    return scores if operands.norms is None else scores * operands.norms


def screen_of(operands: Operands) -> Any:
    return GPU.Screen.of(
        operands.x,
        operands.weight,
        operands.bias,
        tile=ROWS.GATHER_DOT.BLOCK_D,
        norms=operands.norms,
    )


def outside(operands: Operands, recomputed: torch.Tensor) -> int:
    """How many scores are further from their screened ones than the bound says, true scores and
    recomputed ones; those that leave float32's range aside.
    """
    from tests.support.screen_bound_kernels import screened_scores

    [(_, chunk)] = screen_of(operands).chunks(2**31, 1)
    scores, bounds = screened_scores(chunk)
    lower, upper = scores - bounds, scores + bounds
    true = operands.scores()
    wrong = (recomputed > upper) | (recomputed < lower) | (true > upper) | (true < lower)
    return int((wrong & true.abs().lt(2.0**125)).sum())


def missed(operands: Operands, recomputed: torch.Tensor, k: int) -> int:
    """How many latents of the top k, truly or recomputed, are no candidates on rows not flagged."""
    candidates, flags = CANDIDATES.find_candidates(
        screen_of(operands), k, CANDIDATES.list_capacity(k), 2**31
    )
    n_rows, d_sae = operands.x.shape[0], operands.weight.shape[0]
    places = torch.arange(candidates.latents.shape[1], device=flags.device)
    listed = torch.zeros(n_rows, d_sae + 1, dtype=torch.bool, device=flags.device)
    live = places < candidates.counts[:, None]
    listed.scatter_(1, candidates.latents.long().where(live, d_sae), True)
    n_missed = 0
    for scores in (operands.scores(), recomputed):
        # On ties any latent will do.
        in_top = scores > scores.topk(k + 1).values[:, -1:]
        n_missed += int((in_top & ~listed[:, :-1] & (flags == 0)[:, None]).sum())
    return n_missed


def unmarked(operands: Operands, recomputed: torch.Tensor, edge: torch.Tensor) -> int:
    """How many latents whose score reaches `edge`, `[d_sae]`, are not marked."""
    [(_, chunk)] = screen_of(operands).chunks(2**31, 1)
    words = MARKS.marks_of(chunk, edge)
    bits = torch.arange(32, device=words.device)
    marked = (words[:, :, None] >> bits & 1).flatten(1)[:, : chunk.L].bool()
    reach = (operands.scores() >= edge) | (recomputed >= edge)
    return int((reach & ~marked).sum())


def below_on_a_cpu(operands: Operands) -> int:
    """How many scores, true or recomputed, are above the upper bounds of the CPU's screen."""
    x, weight, bias, norms = operands.x, operands.weight, operands.bias, operands.norms
    found = screen_cpu.upper_bounds(x, weight, bias, norms, 2**26)
    upper = torch.cat([part.clone() for _, part in found])
    recomputed = x @ weight.T + bias
    recomputed = recomputed if norms is None else recomputed * norms
    true = operands.scores()
    wrong = (recomputed > upper) | (true > upper)
    return int((wrong & true.abs().lt(2.0**125)).sum())
