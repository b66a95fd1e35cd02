"""Hidden states of a frozen encoder on disk, for heads that are trained on the same rows many times.

    folder/cache.json  states-00000.safetensors …

A file holds `hidden` [N, L, D]: the tokens of rows that stand one behind the other, without padding unless heads are to
read it. cache.json names what they are of, and every file's rows and hash; it is written anew after each file, so that
a killed cache goes on where it stopped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mslt.errors import MsltError
from mslt.evaluate.pool_data import Collate, Example, rows_digest
from mslt.evaluate.result import refuse_other
from mslt.files import lock_alone, sha256_file, write_json
from mslt.heads.pooling import packed_states
from mslt.models.checkpoint import save_state
from mslt.provenance import provenance

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DESCRIPTION = "cache.json"
FILE_BYTES = 256 << 20
BATCH = 32  # rows at once
Progress = Callable[[int, int], None]


def cache_bytes(num_tokens: int, num_states: int, width: int, dtype: str) -> int:
    """N·L·D values."""
    return num_tokens * num_states * width * DTYPES[dtype].itemsize


def refuse_too_large(num_bytes: int, max_gb: float, what: str) -> None:
    """MsltError where a cache would take more than so many GB (10⁹ bytes)."""
    if not num_bytes <= max_gb * 1e9:  # NaN allows nothing
        raise MsltError(
            f"--max-cache-gb {max_gb:g}: the hidden states of {what} take {num_bytes / 1e9:.2f} GB "
            f"({num_bytes:,} bytes); allow more, take fewer rows or --layers, or leave the cache out"
        )


@dataclass(frozen=True)
class StatesCache:
    """`files` [N, L, D], mapped into memory; row r is `lengths[r]` tokens from `starts[r]` in file `file_of[r]`."""

    states: range
    files: list[torch.Tensor]
    file_of: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def read(self, rows: Sequence[int], states: range) -> torch.Tensor:
        """[N, L, D] fp32 of these rows, in their order."""
        lengths = self.lengths[list(rows)]
        first = states.start - self.states.start
        h_NLD = torch.empty(int(lengths.sum()), len(states), self.files[0].shape[2])
        at = 0
        for row, length in zip(rows, lengths.tolist(), strict=True):
            start = int(self.starts[row])
            file = self.files[int(self.file_of[row])]
            h_NLD[at : at + length].copy_(file[start : start + length, first : first + len(states)])
            at += length
        return h_NLD


def make_cache(
    folder: Path,
    model: PreTrainedModel,
    backbone_sha256: str,
    examples: Sequence[Example],
    collate: Collate,
    states: range,
    dtype: str,
    max_gb: float,
    progress: Progress = lambda done, total: None,
) -> StatesCache:
    """Write what is not there yet, and open it. MsltError where it would be larger than `max_gb`, before anything is
    written, where the folder holds another's states, and where a file is not what was written. A folder that holds more
    states than `states` goes on with all of its own."""
    settings = {
        "backbone_sha256": backbone_sha256, "rows_sha256": rows_digest(examples), "states": [states[0], states[-1]],
        "dtype": dtype, "padding": collate.task.num_tokens if collate.keeps_padding else None,
    }  # fmt: skip
    lengths = np.array([collate.num_read(each) for each in examples])
    num_tokens, width = int(lengths.sum()), model.config.hidden_size
    what = f"{len(examples):,} rows of {collate.task.name}"
    refuse_too_large(cache_bytes(num_tokens, len(states), width, dtype), max_gb, what)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_alone(folder / ".lock", f"{folder}: another process writes this cache; wait for it, or name another"):
        described = _described(folder, settings)
        states = range(described["settings"]["states"][0], described["settings"]["states"][1] + 1)
        refuse_too_large(cache_bytes(num_tokens, len(states), width, dtype), max_gb, what)
        pieces = _pieces(lengths, cache_bytes(1, len(states), width, dtype))
        paths = [folder / f"states-{index:05}.safetensors" for index in range(len(pieces))]
        for path, (first, end) in zip(paths, pieces, strict=True):
            if path.name not in described["files"]:
                save_state(path, {"hidden": _states_of(model, examples[first:end], collate, states, DTYPES[dtype])})
                described["files"][path.name] = {
                    "rows": [first, end], "bytes": path.stat().st_size, "sha256": sha256_file(path),
                }  # fmt: skip
                write_json(folder / DESCRIPTION, described)
            progress(end, len(examples))
    files = [_checked(path, described["files"][path.name], piece) for path, piece in zip(paths, pieces, strict=True)]
    file_of = np.repeat(np.arange(len(pieces)), [end - first for first, end in pieces])
    starts = np.concatenate([np.cumsum(lengths[first:end]) - lengths[first:end] for first, end in pieces])
    return StatesCache(states, files, file_of, starts, lengths)


def _described(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.exists():
        return {"settings": settings, "files": {}, "provenance": provenance()}
    try:
        described = json.loads(path.read_text())
        before, _ = dict(described["settings"]), dict(described["files"])
        low, high = map(int, before["states"])
    except (ValueError, KeyError, TypeError):
        raise MsltError(f"{path}: cannot be read; remove {folder}, and the same command makes it anew") from None
    if low <= settings["states"][0] and settings["states"][1] <= high:  # it holds more than is asked for
        settings = {**settings, "states": before["states"]}
    refuse_other(path, before, settings, "--cache")
    return described


def _pieces(lengths: np.ndarray, token_bytes: int) -> list[tuple[int, int]]:
    """First and end row of each file, of FILE_BYTES or one row's."""
    pieces, first, size = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        if size and size + length * token_bytes > FILE_BYTES:
            pieces.append((first, row))
            first, size = row, 0
        size += length * token_bytes
    return [*pieces, (first, len(lengths))]


def _states_of(
    model: PreTrainedModel, examples: Sequence[Example], collate: Collate, states: range, dtype: torch.dtype
) -> torch.Tensor:
    """[N, L, D] in the order of the rows; those of like length share a batch."""
    lengths = np.array([collate.num_read(each) for each in examples])
    starts = np.cumsum(lengths) - lengths
    h_NLD = torch.empty(int(lengths.sum()), len(states), model.config.hidden_size, dtype=dtype)
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        batch = {name: tensor.to(model.device) for name, tensor in collate([examples[row] for row in rows]).items()}
        found = packed_states(model, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"),
                              batch["read_BT"], states).to("cpu", dtype)  # fmt: skip
        for row, part in zip(rows, found.split(lengths[rows].tolist()), strict=True):
            h_NLD[starts[row] : starts[row] + lengths[row]] = part
    return h_NLD


def _checked(path: Path, entry: dict[str, Any], rows: tuple[int, int]) -> torch.Tensor:
    """The tensor in a file of these rows, mapped into memory."""
    try:
        if entry["rows"] != list(rows):
            said = f"holds rows {entry['rows']}, not {list(rows)}"
        elif path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]:
            return load_file(path)["hidden"]
        else:
            said = f"has {path.stat().st_size:,} bytes of {entry['bytes']:,}, or some of them are flipped"
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        said = str(error)
    raise MsltError(
        f"{path}: is not what was written ({said}); remove {path.parent}, and the same command makes it anew"
    )
