"""Losses: those of consecutive steps, kept on the device until they are collected."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROOM", "Losses"]

#: Losses kept on the device until they are collected.
ROOM = 1024


class Losses:
    """Losses of consecutive steps, kept on the device until they are collected."""

    def __init__(self) -> None:
        self._losses = torch.empty(0)
        self._slots: tuple[Tensor, ...] = ()
        self._collected = 0
        self.count = 0

    @property
    def room(self) -> int:
        """How many more can be kept."""
        return ROOM - self.count

    def last(self) -> float:
        """Return the newest."""
        return float(self._losses[(self.count or self._collected) - 1])

    def make_room(self, loss: Tensor) -> None:
        """Make room for losses of the dtype of this one, or of an earlier wider one."""
        if self._slots and loss.dtype == self._losses.dtype:
            return
        dtype = torch.promote_types(loss.dtype, self._losses.dtype) if self._slots else loss.dtype
        if not self._slots or dtype != self._losses.dtype:
            known = self._losses
            self._losses = torch.empty(ROOM, dtype=dtype, device=loss.device)
            self._losses[: len(known)] = known
            self._slots = tuple(self._losses.unbind())

    def keep(self, loss: Tensor) -> None:
        """Keep a copy of a loss that there is room for."""
        self._slots[self.count].copy_(loss if loss.ndim == 0 else loss.reshape(()))
        self.count += 1

    def drop(self, count: int) -> None:
        """Drop the newest losses, unless already collected."""
        self.count = max(0, self.count - count)

    def collect(self) -> Tensor:
        """Return a copy of those not collected before."""
        count, self.count = self.count, 0
        self._collected = count or self._collected
        return self._losses[:count].clone()
