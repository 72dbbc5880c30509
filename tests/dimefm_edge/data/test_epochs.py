"""Epochs as permutations, and fingerprints of rows."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.data.epochs import Epochs, rows_fingerprints


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (3, 8), (1, 5)])
def test_batches_are_pieces_of_permutations(count: int, batch_size: int) -> None:
    rows = np.arange(100, 100 + count)
    epochs = Epochs(rows, batch_size=batch_size, seed=1, stream=0)
    steps = 6 * count
    seen = np.concatenate([epochs.rows(step) for step in range(steps)])
    assert len(seen) == steps * batch_size
    for epoch in seen.reshape(-1, count):
        assert sorted(epoch) == rows.tolist()
    # Any step alone, in any order, by another object.
    other = Epochs(rows, batch_size=batch_size, seed=1, stream=0)
    for step in reversed(range(steps)):
        np.testing.assert_array_equal(
            other.rows(step), seen[step * batch_size : (step + 1) * batch_size]
        )


def test_seeds_and_streams_differ() -> None:
    rows = np.arange(50)
    made = [
        Epochs(rows, batch_size=50, seed=seed, stream=stream).rows(0).tolist()
        for seed, stream in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(m) for m in made}) == 3


def test_a_fingerprint_tells_rows() -> None:
    rows = np.arange(9)
    first, same, other = (
        rows_fingerprints(of=choice)["of"] for choice in (rows, rows.copy(), rows[::-1])
    )
    assert first == same
    assert first != other
    assert len(first) == 16
