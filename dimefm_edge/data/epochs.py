"""Rows of a step's batch: consecutive pieces of shuffled epochs, a function of (seed, step)."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def rows_fingerprints(**choices: Rows | None) -> dict[str, str]:
    """16 hex digits that tell a choice of rows from others, by name; of those that are made."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()[:16]
        for name, rows in choices.items()
        if rows is not None
    }


class Epochs:
    """An endless row of permutations, cut into batches."""

    def __init__(self, rows: Rows, *, batch_size: int, seed: int, stream: int) -> None:
        """
        Args:
            rows: (N,) what an epoch passes over, N > 0.
            batch_size: Rows of a step.
            seed: Of the run.
            stream: Tells these random numbers from others of the run.
        """
        self._rows, self._batch_size = rows, batch_size
        self._seed, self._stream = seed, stream
        self._orders: dict[int, Rows] = {}

    def rows(self, step: int) -> Rows:
        """(batch_size,) rows of a step."""
        count, start = self._batch_size, step * self._batch_size
        pieces: list[Rows] = []
        while count:
            epoch, offset = divmod(start, len(self._rows))
            piece = self._order(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _order(self, epoch: int) -> Rows:
        if epoch not in self._orders:
            rng = np.random.default_rng([self._seed, self._stream, epoch])
            # Inputs are fetched ahead of their batches: the epoch before is still asked for.
            self._orders = {e: rows for e, rows in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.permutation(self._rows)
        return self._orders[epoch]
