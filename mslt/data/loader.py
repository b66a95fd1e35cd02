"""Batches: samples at positions of the data, as tensors. B batch, T tokens, M masked positions.

A batch holds input_ids, token_type_ids, attention_mask [B, T], mlm_positions, mlm_labels [B, M] and nsp_labels [B],
all int64; nsp_labels is 0 where B follows A, 1 where it is random, as in Hugging Face's BertForPreTraining, and
IGNORED_LABEL where there is no B because next-sentence prediction is switched off.
"""

import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mslt.config import DataConfig
from mslt.data.masking import IGNORED_LABEL, mask_tokens
from mslt.data.order import SampleOrder
from mslt.data.shards import Shards
from mslt.plan import Stage

Batch = dict[str, torch.Tensor]
EVALUATION_SEED = 0  # of no run: runs with the same data section are held out on the same samples and masks


class Samples:
    """Random access to the samples of one split."""

    def __init__(self, shards: Shards, config: DataConfig, sequence_length: int, seed: int) -> None:
        self.order = SampleOrder(
            shards, sequence_length, config.short_sequence_probability, seed, config.next_sentence_prediction
        )
        self.shards = shards
        self.config = config
        self.sequence_length = sequence_length
        self.seed = seed

    def batch(self, positions: Iterable[int]) -> Batch:
        """The samples at these positions of the data, stacked."""
        epoch_B, index_B = self.order.locate(np.fromiter(positions, np.int64))
        segments = self.order.segments(epoch_B, index_B)
        special = self.shards.special_ids
        a_B, b_B = segments.num_tokens_BS.T
        a_end_B = 1 + a_B  # of [SEP]
        end_B = a_end_B + 1 + b_B if self.order.pairs else a_end_B  # of the last [SEP]
        num_tokens_B = end_B + 1

        position_T = np.arange(self.sequence_length)
        is_b_BT = (position_T > a_end_B[:, None]) & (position_T <= end_B[:, None])
        is_text_BT = (position_T > 0) & (position_T < end_B[:, None]) & (position_T != a_end_B[:, None])
        input_ids_BT = np.full(is_text_BT.shape, special.pad, np.int64)
        input_ids_BT[:, 0] = special.cls
        row_B = np.arange(len(end_B))
        input_ids_BT[row_B, a_end_B] = input_ids_BT[row_B, end_B] = special.sep
        runs = self.shards.token_runs(segments.first_token_BS.ravel(), segments.num_tokens_BS.ravel())
        input_ids_BT[is_text_BT] = np.concatenate(runs)  # A and B of each row, as the rows' text goes on
        positions_BM, labels_BM = mask_tokens(
            input_ids_BT,
            is_text_BT,
            num_tokens_B,
            epoch_B,
            index_B,
            seed=self.seed,
            mask_probability=self.config.mask_probability,
            max_predictions=self.config.max_predictions,
            mask_id=special.mask,
            vocab_size=self.shards.vocab_size,
            is_continuation_V=self.shards.is_continuation_V if self.config.whole_word_masking else None,
        )
        arrays = {
            "input_ids": input_ids_BT,
            "token_type_ids": is_b_BT.astype(np.int64),
            "attention_mask": (position_T < num_tokens_B[:, None]).astype(np.int64),
            "mlm_positions": positions_BM,
            "mlm_labels": labels_BM,
            "nsp_labels": np.where(self.order.pairs, segments.is_random_B, IGNORED_LABEL),
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
    first_sample = stage.first_sample + first_step * stage.batch_size
    samples.batch([first_sample])  # everything that is made at first use, before workers fork
    return iter(
        DataLoader(
            _StepBatches(samples, stage, rank, world_size),
            batch_size=None,
            sampler=range(first_step, stage.steps),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_rank,
        )
    )


def _leave_signals_to_the_rank(_: int) -> None:
    """A cluster tells every process of a job to go; the rank still saves then, and ends its loaders after."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def evaluation_batches(samples: Samples, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """The split's first `evaluation_samples` samples of epoch 0 (all, where it has fewer), dealt out to the ranks.

    Every rank gets as many batches, for with ZeRO-3 a forward pass is a collective: where it has no sample left, one
    without labels.
    """
    count = min(samples.config.evaluation_samples, samples.order.num_samples(0))
    mine = range(rank, count, world_size)
    for first in range(0, -(-count // world_size), batch_size):
        indices = mine[first : first + batch_size]
        batch = samples.batch(indices or [0])
        if not indices:
            batch |= {name: torch.full_like(batch[name], IGNORED_LABEL) for name in ("mlm_labels", "nsp_labels")}
        yield batch
