"""Batches: samples at positions of the data, as tensors. B batch, T tokens, M masked positions.

A batch holds input_ids, token_type_ids, attention_mask [B, T], mlm_positions, mlm_labels [B, M] and nsp_labels [B],
all int64; nsp_labels is 0 where B follows A, 1 where it is random, as in Hugging Face's BertForPreTraining.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mslt.config import DataConfig
from mslt.data.masking import mask_tokens
from mslt.data.order import SampleOrder
from mslt.data.shards import Shards
from mslt.plan import Stage

Batch = dict[str, torch.Tensor]
EVALUATION_SEED = 0  # of no run: held-out losses of all runs are taken on the same samples and masks


class Samples:
    """Random access to the samples of one split."""

    def __init__(self, shards: Shards, config: DataConfig, sequence_length: int, seed: int) -> None:
        self.order = SampleOrder(shards, sequence_length, config.short_sequence_probability, seed)
        self.config = config
        self.sequence_length = sequence_length
        self.seed = seed
        self.special_ids = shards.special_ids
        self.vocab_size = shards.vocab_size

    def batch(self, positions: Iterable[int]) -> Batch:
        """The samples at these positions of the data, stacked."""
        addresses = [self.order.locate(position) for position in positions]
        epoch_B, index_B = np.array(addresses, np.int64).reshape(-1, 2).T
        shape_BT = (len(addresses), self.sequence_length)
        input_ids_BT = np.full(shape_BT, self.special_ids.pad, np.int64)
        token_type_ids_BT = np.zeros(shape_BT, np.int64)
        maskable_BT = np.zeros(shape_BT, bool)
        num_tokens_B = np.zeros(len(addresses), np.int64)
        nsp_labels_B = np.zeros(len(addresses), np.int64)
        for row, (epoch, index) in enumerate(addresses):
            pair = self.order.pair(epoch, index)
            b_start, length = len(pair.a) + 2, len(pair.a) + len(pair.b) + 3
            input_ids_BT[row, 0] = self.special_ids.cls
            input_ids_BT[row, 1 : b_start - 1] = pair.a
            input_ids_BT[row, [b_start - 1, length - 1]] = self.special_ids.sep
            input_ids_BT[row, b_start : length - 1] = pair.b
            token_type_ids_BT[row, b_start:length] = 1
            maskable_BT[row, 1 : length - 1] = True
            maskable_BT[row, b_start - 1] = False
            num_tokens_B[row], nsp_labels_B[row] = length, pair.is_random
        attention_mask_BT = np.arange(shape_BT[1]) < num_tokens_B[:, None]
        positions_BM, labels_BM = mask_tokens(
            input_ids_BT,
            maskable_BT,
            num_tokens_B,
            epoch_B,
            index_B,
            seed=self.seed,
            mask_probability=self.config.mask_probability,
            max_predictions=self.config.max_predictions,
            mask_id=self.special_ids.mask,
            vocab_size=self.vocab_size,
        )
        arrays = {
            "input_ids": input_ids_BT,
            "token_type_ids": token_type_ids_BT,
            "attention_mask": attention_mask_BT.astype(np.int64),
            "mlm_positions": positions_BM,
            "mlm_labels": labels_BM,
            "nsp_labels": nsp_labels_B,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class _StepBatches(Dataset[Batch]):
    """Step of a stage → this rank's contiguous share of the step's samples."""

    def __init__(self, samples: Samples, stage: Stage, rank: int, world_size: int) -> None:
        self.samples = samples
        self.stage = stage
        self.share = stage.batch_size // world_size
        self.rank = rank

    def __getitem__(self, step: int) -> Batch:
        first = self.stage.first_sample + step * self.stage.batch_size + self.rank * self.share
        return self.samples.batch(range(first, first + self.share))


def training_batches(
    samples: Samples, stage: Stage, rank: int, world_size: int, first_step: int, num_workers: int
) -> Iterator[Batch]:
    """One batch a step, from `first_step` of the stage to its end. World size never alters the order of samples."""
    samples.order.locate(stage.first_sample + first_step * stage.batch_size)  # built once, before workers fork
    return iter(
        DataLoader(
            _StepBatches(samples, stage, rank, world_size),
            batch_size=None,
            sampler=range(first_step, stage.steps),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )


def evaluation_batches(samples: Samples, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """The split's first `evaluation_samples` samples of epoch 0 (all, where it has fewer), dealt out to the ranks."""
    count = min(samples.config.evaluation_samples, len(samples.order.index(0).start))
    mine = range(rank, count, world_size)
    for first in range(0, len(mine), batch_size):
        yield samples.batch(mine[first : first + batch_size])
