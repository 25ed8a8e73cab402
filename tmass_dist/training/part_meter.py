"""The share and the loss of each part of a mixture, for the log of a run."""

# Shapes: B pairs of this rank, K parts.

from __future__ import annotations

import torch
from torch import Tensor

from tmass_dist.data.index import Index
from tmass_dist.data.mixture import Mixture
from tmass_dist.distributed import all_reduce_sum


class PartMeter:
    """Adds up pairs and losses of the parts between two entries of the log; without a mixture it does nothing.

    Args:
        training: the training data.
        device: of the losses.
    """

    def __init__(self, training: Index, device: torch.device) -> None:
        self._names = training.names if isinstance(training, Mixture) else ()
        self._device = device
        self._pairs_K, self._losses_K = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)

    def add(self, parts: list[int], pair_loss_B: Tensor) -> None:
        """Add a step: the part and the loss of each pair of this rank. Waits for no GPU."""
        if self._names:
            part_B = torch.tensor(parts).to(self._device, non_blocking=True)
            self._pairs_K.index_add_(0, part_B, torch.ones_like(pair_loss_B, dtype=torch.float64))
            self._losses_K.index_add_(0, part_B, pair_loss_B.double())

    def read(self) -> dict[str, float]:
        """Share of the pairs and mean loss of each part since the last call; a collective for a mixture.

        A part without a pair has a share of 0 and no loss.
        """
        if not self._names:
            return {}
        sums = torch.stack([self._pairs_K, self._losses_K])
        all_reduce_sum(sums)
        self._pairs_K.zero_()
        self._losses_K.zero_()
        pairs, losses = sums.tolist()
        values = {f"mixture/{name}/share": number / max(1.0, sum(pairs)) for name, number in zip(self._names, pairs)}
        return values | {
            f"mixture/{name}/loss": loss / number for name, number, loss in zip(self._names, pairs, losses) if number
        }
