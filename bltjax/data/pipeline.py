"""Packed rows to an endless, resumable stream of batches."""

import grain
import numpy as np

from bltjax.data.packing import Row


class RowSource:
    """Random access to a stack of rows, as Grain wants it."""

    def __init__(self, rows: Row):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.tokens)

    def __getitem__(self, index: int) -> dict:
        return as_batch(Row(*(field[index] for field in self.rows)))


def as_batch(rows: Row) -> dict:
    """Rows as the dict of arrays that a training step takes; int32, masks bool.

    patch_lengths are left out where rows carry no patches.
    """
    batch = {
        name: np.asarray(value, value.dtype if value.dtype == bool else np.int32)
        for name, value in rows._asdict().items()
    }
    if not batch["patch_lengths"].shape[-1]:
        del batch["patch_lengths"]
    return batch


def batches(rows: Row, batch_size: int, seed: int):
    """Endless iterator of batches: rows in a new seeded order every epoch.

    `get_state` and `set_state` hold its position: a resumed iterator goes on with the very next
    batch. Raises ValueError when there are fewer rows than one batch needs.
    """
    if len(rows.tokens) < batch_size:
        raise ValueError(
            f"the corpus fills {len(rows.tokens)} rows, fewer than batch_size="
            f"{batch_size}: lower batch_size or row_bytes, or give more text"
        )
    dataset = grain.MapDataset.source(RowSource(rows)).shuffle(seed=seed).repeat()
    return iter(
        dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        )
    )


def whole_batches(rows: Row, batch_size: int):
    """Every row once, in order; the last batch is filled with rows that count nothing."""
    for start in range(0, len(rows.tokens), batch_size):
        batch = as_batch(Row(*(field[start : start + batch_size] for field in rows)))
        missing = batch_size - len(batch["tokens"])
        if missing:
            batch = {
                k: np.concatenate([v, np.repeat(v[-1:], missing, axis=0)]) for k, v in batch.items()
            }
            batch["loss_mask"][-missing:] = False
        yield batch
