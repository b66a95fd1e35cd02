"""Masked language modelling (Devlin et al. 2019, section 3.1): which tokens are predicted, and what stands there.

B batch, T tokens, M masked positions (fixed, padded). Follows Google's `create_pretraining_data.py`: of n tokens with
[CLS] and [SEP] counted, min(max_predictions, max(1, round(n * mask_probability))) are predicted, never a special one;
80 % become [MASK], 10 % a random entry of the vocabulary, 10 % stay.
"""

import numpy as np

from mslt.data import keyed

IGNORED_LABEL = -100


def mask_tokens(
    input_ids_BT: np.ndarray,
    maskable_BT: np.ndarray,
    num_tokens_B: np.ndarray,
    epoch_B: np.ndarray,
    index_B: np.ndarray,
    *,
    seed: int,
    mask_probability: float,
    max_predictions: int,
    mask_id: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask `input_ids_BT` in place; return positions [B, M], ascending, and labels [B, M].

    Rows with fewer than M predictions are filled up with position 0 and IGNORED_LABEL. `epoch_B` and `index_B` are
    the samples' addresses: the same sample is masked the same way in whichever batch it comes.
    """
    wanted_B = np.clip(np.rint(num_tokens_B * mask_probability).astype(np.int64), 1, max_predictions)
    wanted_B = np.minimum(wanted_B, maskable_BT.sum(1))
    epoch_B1, index_B1 = epoch_B[:, None], index_B[:, None]

    rank_BT = keyed.uniform(seed, "mask_position", epoch_B1, index_B1, np.arange(input_ids_BT.shape[1]))
    rank_BT[~maskable_BT] = 2.0  # behind every maskable position
    first_BM = np.argsort(rank_BT, axis=1, kind="stable")[:, :max_predictions]
    slot_M = np.arange(max_predictions)
    is_used_BM = slot_M < wanted_B[:, None]
    positions_BM = np.sort(np.where(is_used_BM, first_BM, np.iinfo(np.int64).max), axis=1)
    positions_BM[~is_used_BM] = 0
    original_BM = np.take_along_axis(input_ids_BT, positions_BM, axis=1)

    fate_BM = keyed.uniform(seed, "mask_fate", epoch_B1, index_B1, slot_M)
    random_BM = keyed.integers(vocab_size, seed, "mask_random", epoch_B1, index_B1, slot_M)
    replaced_BM = np.where(fate_BM < 0.8, mask_id, np.where(fate_BM < 0.9, random_BM, original_BM))
    rows_BM = np.broadcast_to(np.arange(len(input_ids_BT))[:, None], positions_BM.shape)
    input_ids_BT[rows_BM[is_used_BM], positions_BM[is_used_BM]] = replaced_BM[is_used_BM]
    return positions_BM, np.where(is_used_BM, original_BM, IGNORED_LABEL)
