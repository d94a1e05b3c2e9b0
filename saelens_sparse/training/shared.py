"""What several SAEs have in common that are trained in turn: their batch, and one copy of a log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler
from torch.overrides import TorchFunctionMode
from typing_extensions import override


class SharedBatch:
    """
    A batch on the device of the SAEs, moved and scaled once for all that are trained on it.

    Args:
        n_users: How many SAEs take each batch. After the last one, no reference to it is kept.
    """

    def __init__(self, n_users: int = 1) -> None:
        self._n_users = n_users
        self._batch: torch.Tensor | None = None
        self._n_left = 0
        # On the device, by scaling factor.
        self._made: dict[float | None, torch.Tensor] = {}

    def take(
        self, batch: torch.Tensor, device: torch.device, scaler: ActivationScaler | None = None
    ) -> torch.Tensor:
        """
        A batch on a device, scaled. Whoever takes it must not change it.

        Args:
            batch: `[batch_size, d_in]`. The same object stands for the same batch.
            device: The same for all users.
            scaler: None for a batch as it is.
        """
        if self._batch is not batch:
            self._batch, self._n_left = batch, self._n_users
            self._made = {None: batch.to(device, non_blocking=device.type == "cuda")}
        made = self._made
        self._n_left -= 1
        if self._n_left == 0:
            self._batch, self._made = None, {}
        if scaler is None:
            return made[None]
        if type(scaler) is not ActivationScaler or scaler.whitening is not None:
            return scaler(made[None])
        if scaler.scaling_factor not in made:
            made[scaler.scaling_factor] = scaler(made[None])
        return made[scaler.scaling_factor]


class _TensorsAsItems(TorchFunctionMode):
    """Within, `Tensor.item` gives a tensor, so that nothing waits for the device."""

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach().reshape(())
        return func(*args, **(kwargs or {}))


def logs_at_once(makers: Mapping[str, Callable[[], Mapping[str, Any]]]) -> dict[str, Any]:
    """
    What functions log of values on the device, copied to the host together.

    Args:
        makers: Each gives numbers by name, which it reads with `Tensor.item`.

    Returns:
        All of them, the names with `key/` before them. The numbers are those that `Tensor.item`
        gives.
    """
    log: dict[str, Any] = {}
    with _TensorsAsItems():
        for key, make in makers.items():
            log |= {f"{key}/{name}": value for name, value in make().items()}
    alike: defaultdict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, value in log.items():
        if isinstance(value, torch.Tensor):
            alike[value.device, value.dtype].append(name)
    for names in alike.values():
        log |= zip(names, torch.stack([log[name] for name in names]).tolist(), strict=True)
    return log
