"""What a frozen encoder makes of sentences: a vector from each of its hidden states, all in one pass, on disk.

R rows, B batch, T tokens, L hidden states (layers + 1), D width. Hidden state 0 is the embedding output, hidden state
k+1 the output of layer k.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mslt.errors import MsltError
from mslt.files import whole_file
from mslt.heads.layer_probe import Features
from mslt.heads.off_ramp import Pooling, pool
from mslt.models.layer_stack import iter_hidden

BATCH_SIZE = 64
SUMMED_ROWS = 1024  # at once
LEAST_DEVIATION = 1e-6  # a component that says nothing stays 0


@torch.inference_mode()
def pooled_hidden(model: PreTrainedModel, batch: dict[str, torch.Tensor], pooling: Pooling) -> torch.Tensor:
    """[B, L, D] of ids and mask [B, T]: the first token of each hidden state, or the mean over all that is no
    padding."""
    mask_BT = batch["attention_mask"]
    is_padded = not bool(mask_BT.all())
    walk = iter_hidden(model, batch["input_ids"], batch.get("token_type_ids"), mask_BT if is_padded else None)
    return torch.stack([pool(h_BTD, mask_BT if is_padded else None, pooling) for _, h_BTD in walk], 1)


def write_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    path: Path,
    pooling: Pooling,
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> int:
    """Write [R + 1, L, D] fp16: rows in the order of the texts, as differences from the last, so that what little
    [CLS] differs by in low layers is not rounded away. Returns how many texts were cut to `max_tokens`. MsltError where
    the disk has no room for it, and for what fp16 does not hold."""
    shape = (len(texts) + 1, model.config.num_hidden_layers + 1, model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # like lengths share a batch
    num_cut, base_LD = 0, None
    with whole_file(path) as temporary:
        for old in (path, temporary):  # what a killed process left takes no room from this
            old.unlink(missing_ok=True)
        refuse_full_disk(path, 2 * int(np.prod(shape)))
        file = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for first in range(0, len(texts), BATCH_SIZE):
            indices = order[first : first + BATCH_SIZE]
            given = tokenizer(
                [texts[index] for index in indices], truncation=True, max_length=max_tokens, padding="longest",
                padding_side="right", return_tensors="pt",
            )  # fmt: skip
            batch = {name: tensor.to(model.device) for name, tensor in given.items()}
            pooled_BLD = pooled_hidden(model, batch, pooling).cpu()
            if base_LD is None:
                base_LD = pooled_BLD[0]
                file[-1] = base_LD.half().numpy()  # its rounding is alike for all rows: no difference is touched
            features_BLD = (pooled_BLD - base_LD).half()
            if not features_BLD.isfinite().all() or not base_LD.half().isfinite().all():
                raise MsltError(f"{model.name_or_path}: its hidden states are not finite in fp16 (65,504 is the most); "
                                "its weights are damaged, or training diverged")  # fmt: skip
            file[indices] = features_BLD.numpy()
            if given["input_ids"].shape[1] == max_tokens:
                long = [texts[index] for index in indices]
                num_cut += sum(len(ids) > max_tokens for ids in tokenizer(long, verbose=False)["input_ids"])
            progress(first + len(indices), len(texts))
        file.flush()
        del file
    return num_cut


def open_features(path: Path) -> Features:
    """As they were: what is not read is not loaded."""
    file = torch.from_numpy(np.load(path, mmap_mode="c"))
    return Features(file[:-1], torch.ones(file.shape[1:]), file[-1].float())


def standardized(features: Features, rows: np.ndarray) -> Features:
    """With mean 0 and deviation 1 in each component over these rows."""
    sums = torch.zeros(2, *features.shift_LD.shape, dtype=torch.float64)
    for first in range(0, len(rows), SUMMED_ROWS):
        x_BLD = features.rows_RLD[torch.from_numpy(rows[first : first + SUMMED_ROWS])].double()
        sums += torch.stack([x_BLD.sum(0), x_BLD.square().sum(0)])
    mean_LD, square_LD = sums / len(rows)
    scale_LD = 1 / ((square_LD - mean_LD**2).clamp(min=0).sqrt() + LEAST_DEVIATION)
    return Features(features.rows_RLD, scale_LD.float(), (-mean_LD * scale_LD).float())


def refuse_full_disk(path: Path, num_bytes: int) -> None:
    """MsltError where there is less room."""
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise MsltError(f"{path}: features of all layers take {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                        "make room, or give --out on another disk")  # fmt: skip
