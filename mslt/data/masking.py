"""Masked language modelling (Devlin et al. 2019, section 3.1): which tokens are predicted, and what stands there.

B batch, T tokens, M masked positions (fixed, padded), W words, V vocabulary. Follows Google's
`create_pretraining_data.py`: of n tokens with [CLS] and [SEP] counted, min(max_predictions, max(1, round(n *
mask_probability))) are predicted (halves go to the even number, as in Python), each position once, never a special
one; 80 % become [MASK], 10 % a random entry of the vocabulary (special ones, or the token itself, may come up), 10 %
stay; each token draws for itself. Whole words likewise (`--do_whole_word_mask`): a token and the pieces `##…` behind it
are predicted together; words come in random order, and one that would exceed the number is passed over. Two deviations:
  - a piece at the beginning of A or B is a word of its own, instead of going on the last word before the [SEP];
  - masks are drawn anew in every epoch, instead of written once into each of `dupe_factor` copies.
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
    is_continuation_V: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask `input_ids_BT` in place; return positions [B, M], ascending, and labels [B, M].

    Rows with fewer than M predictions are filled up with position 0 and IGNORED_LABEL. `epoch_B` and `index_B` are
    the samples' addresses: the same sample is masked the same way in whichever batch it comes. With
    `is_continuation_V`, True for entries that go on a word, whole words are masked.
    """
    wanted_B = np.clip(np.rint(num_tokens_B * mask_probability).astype(np.int64), 1, max_predictions)
    wanted_B = np.minimum(wanted_B, maskable_BT.sum(1))
    order_BT = keyed.bits(seed, "mask_position", epoch_B[:, None], index_B[:, None], np.arange(input_ids_BT.shape[1]))
    if is_continuation_V is None:
        chosen_BT = _first_tokens(order_BT, maskable_BT, wanted_B)
    else:
        chosen_BT = _first_words(order_BT, maskable_BT, wanted_B, is_continuation_V[input_ids_BT])

    row, position = np.nonzero(chosen_BT)
    count_B = chosen_BT.sum(1)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    original = input_ids_BT[row, position]
    key = epoch_B[row], index_B[row], slot
    fate = keyed.uniform(seed, "mask_fate", *key)
    random_token = keyed.integers(vocab_size, seed, "mask_random", *key)
    input_ids_BT[row, position] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, random_token, original))
    positions_BM = np.zeros((len(input_ids_BT), max_predictions), np.int64)
    labels_BM = np.full_like(positions_BM, IGNORED_LABEL)
    positions_BM[row, slot], labels_BM[row, slot] = position, original
    return positions_BM, labels_BM


def _first_tokens(order_BT: np.ndarray, maskable_BT: np.ndarray, wanted_B: np.ndarray) -> np.ndarray:
    """bool [B, T]: the first `wanted_B` maskable tokens in the order of the draws."""
    order_BT = _distinct(order_BT, maskable_BT)
    last_B1 = np.take_along_axis(np.sort(order_BT, axis=1), wanted_B[:, None] - 1, axis=1)
    return (order_BT <= last_B1) & maskable_BT


def _first_words(
    order_BT: np.ndarray, maskable_BT: np.ndarray, wanted_B: np.ndarray, goes_on_BT: np.ndarray
) -> np.ndarray:
    """bool [B, T]: words in the order of their first tokens' draws, passing over those that exceed `wanted_B`."""
    starts_BT = maskable_BT.copy()
    starts_BT[:, 1:] &= ~(goes_on_BT[:, 1:] & maskable_BT[:, :-1])
    word_BT = np.cumsum(starts_BT, axis=1) - 1  # of every maskable token, counted in its row
    num_rows, num_words = len(starts_BT), int(word_BT.max()) + 1
    rows_B1 = np.arange(num_rows)[:, None]
    flat_word_BT = word_BT + rows_B1 * num_words
    size_BW = np.bincount(flat_word_BT[maskable_BT], minlength=num_rows * num_words).reshape(num_rows, num_words)
    draws_BW = np.full((num_rows, num_words), np.iinfo(np.uint64).max)
    draws_BW.flat[flat_word_BT[starts_BT]] = _distinct(order_BT, starts_BT)[starts_BT]
    turn_BW = np.argsort(draws_BW, axis=1)
    chosen_BW = np.zeros((num_rows, num_words), bool)
    left_B = wanted_B.copy()
    for turn_B in turn_BW.T:
        size_B = size_BW[rows_B1[:, 0], turn_B]
        fits_B = (size_B <= left_B) & (size_B > 0)
        chosen_BW[rows_B1[:, 0], turn_B] = fits_B
        left_B -= size_B * fits_B
        if not left_B.any():
            break
    return np.take_along_axis(chosen_BW, np.maximum(word_BT, 0), axis=1) & maskable_BT


def _distinct(order_BT: np.ndarray, taking_part_BT: np.ndarray) -> np.ndarray:
    """The draws with the position in their low 11 bits (more beyond 2,048 tokens), so that no two of a row are equal
    and the lower position goes first; those that take no part come last."""
    position_T = np.arange(order_BT.shape[1], dtype=np.uint64)
    low_bits = np.uint64(max(11, len(position_T).bit_length()))
    return np.where(taking_part_BT, order_BT >> low_bits << low_bits | position_T, np.iinfo(np.uint64).max)
