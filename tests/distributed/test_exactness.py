"""The engine's updates are LAMB's, whatever the ZeRO stage, the number of workers, the micro-batches, and what is
frozen. The benchmark of the same name says what is compared, and writes it into a table."""

from pathlib import Path

import pytest

from benchmarks.engine_exactness import measure

ZERO_STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_updates_are_those_of_plain_lamb(tmp_path: Path, shards: Path, world_size: int) -> None:
    """With a library's LAMB beside it on two workers: under ZeRO-1 that is off, and is seen to be."""
    rows = measure(tmp_path, shards, world_size, ["fp32"], ZERO_STAGES, beside=True)
    assert len(rows) == 10 if world_size == 2 else 8
    assert not {row.cell.label: row.missed for row in rows if row.missed}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_zero_changes_low_precision_by_the_rounding_of_what_is_reduced_alone(
    tmp_path: Path, shards: Path, world_size: int
) -> None:
    """As shipped, bf16 and fp16 are reduced as such: in ZeRO-2 and 3 every micro-batch, on more than two workers in
    another order. That is no more than the precision itself costs, and is gone where fp32 is reduced."""
    rows = measure(tmp_path, shards, world_size, ["bf16", "fp16"], ZERO_STAGES, beside=True)
    assert not {row.cell.label: row.missed for row in rows if row.missed}
    for row in rows:
        if "as shipped" in row.cell.table:
            assert row.worst[-1][0] < 0.05, row.cell.label
            assert row.from_fp32 < 0.1, row.cell.label
