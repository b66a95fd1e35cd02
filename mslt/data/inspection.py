"""A look inside: one sample with its masks marked, what a corpus looks like, and whether samples keep to their rules.

Each comes as plain data, for JSON, with a function that renders it for a terminal. Everything streams: memory does not
grow with the corpus.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mslt.data.loader import Samples
from mslt.data.manifest import TOKENIZER_FILE
from mslt.data.masking import IGNORED_LABEL
from mslt.data.shards import Shards
from mslt.errors import MsltError

SLICE = 2**20  # elements of a mapped array looked at at a time
SAMPLES_AT_ONCE = 512
BAR_WIDTH = 40


# One sample


def describe_sample(samples: Samples, position: int) -> dict[str, Any]:
    """The sample at this position of the data. A token of a segment is `{"token": what stands there}`, with `"label"`,
    what is to be predicted, where it is. `next` is None without next-sentence prediction."""
    if position < 0:
        raise MsltError(f"position {position}: samples are counted from 0")
    tokenizer = _tokenizer(samples.shards)
    (epoch,), (index,) = samples.order.locate(np.array([position]))
    segments = samples.order.segments(np.array([epoch]), np.array([index]))
    batch = {name: tensor[0].numpy() for name, tensor in samples.batch([position]).items()}
    labels = dict(zip(batch["mlm_positions"].tolist(), batch["mlm_labels"].tolist(), strict=True))
    described, first = [], 1
    for side, name in enumerate("AB" if samples.order.pairs else "A"):
        num_tokens = int(segments.num_tokens_BS[0, side])
        document = int(_document_of_token(samples, segments.first_token_BS[:, side])[0])
        tokens = []
        for place in range(first, first + num_tokens):
            token = {"token": tokenizer.id_to_token(int(batch["input_ids"][place]))}
            if labels.get(place, IGNORED_LABEL) != IGNORED_LABEL:
                token["label"] = tokenizer.id_to_token(labels[place])
            tokens.append(token)
        described.append({"name": name, "document": document, "num_tokens": num_tokens, "tokens": tokens})
        first += num_tokens + 1
    is_next = ("Random" if segments.is_random_B[0] else "IsNext") if samples.order.pairs else None
    return {
        "position": position,
        "epoch": int(epoch),
        "index": int(index),
        "sequence_length": samples.sequence_length,
        "num_tokens": int(batch["attention_mask"].sum()),
        "num_predictions": int((batch["mlm_labels"] != IGNORED_LABEL).sum()),
        "next": is_next,
        "segments": described,
    }


def render_sample(sample: dict[str, Any]) -> str:
    """`[MASK→sat]` is to be predicted; `{table→chair}`: a random word stands where chair was; `{mat}`: itself."""
    label = f"  {sample['next']}" if sample["next"] else ""
    lines = [
        f"sample {sample['position']:,}: epoch {sample['epoch']}, index {sample['index']:,}{label}",
        f"{sample['num_tokens']} of {sample['sequence_length']} tokens, {sample['num_predictions']} to predict",
    ]
    for segment in sample["segments"]:
        lines += ["", f"{segment['name']}  document {segment['document']:,}, {segment['num_tokens']} tokens"]
        lines += ["   " + "".join(map(_marked, segment["tokens"])).strip()]
    lines += ["", "[MASK→x] predict x   {y→x} y stands where x is to be predicted   {x} predict x, which stands there"]
    return "\n".join(lines)


def _marked(token: dict[str, str]) -> str:
    stands, label = token["token"], token.get("label")
    if label is None:
        return stands[2:] if stands.startswith("##") else f" {stands}"
    space = "" if label.startswith("##") else " "
    if stands == "[MASK]":
        return f"{space}[MASK→{label}]"
    return f"{space}{{{stands}→{label}}}" if stands != label else f"{space}{{{label}}}"


# The corpus


def describe_corpus(samples: Samples, num_samples: int = 100_000, num_frequent: int = 20) -> dict[str, Any]:
    """Counts and histograms of a split, and of the first `num_samples` samples of epoch 0, a random choice of all;
    `broken_rules` are those that these samples do not keep."""
    shards, order = samples.shards, samples.order
    tokenizer = _tokenizer(shards)
    counts_V = np.zeros(shards.vocab_size, np.int64)
    for block in shards.token_blocks:
        for tokens in _slices(block):
            counts_V += np.bincount(tokens, minlength=shards.vocab_size)
    num_tokens = int(counts_V.sum())
    total = order.num_samples(0)
    looked_at = min(num_samples, total)
    lengths = [_sample_lengths(samples, positions) for positions in _parts(range(looked_at))]
    frequent = np.argsort(-counts_V, kind="stable")[:num_frequent].tolist()
    return {
        "folder": str(shards.folder),
        "split": shards.split,
        "documents": shards.num_documents,
        "sentences": shards.num_sentences,
        "tokens": num_tokens,
        "unknown_share": int(counts_V[shards.special_ids.unk]) / num_tokens,
        "unused_entries": int((counts_V == 0).sum()),
        "sentences_per_document": histogram(_differences(shards.document_starts)),
        "tokens_per_sentence": histogram(_differences(shards.token_starts)),
        "sequence_length": samples.sequence_length,
        "samples_per_epoch": total,
        "samples_looked_at": looked_at,
        "tokens_per_sample": histogram(lengths),
        # Three standard errors of a share of a half: 0.005 at 100,000 samples.
        "broken_rules": broken_rules(
            count_samples(samples, range(looked_at)), samples.config.whole_word_masking, 1.5 / looked_at**0.5
        ),
        "padding_share": 1 - int(sum(part.sum() for part in lengths)) / (looked_at * samples.sequence_length),
        "frequent_tokens": [
            {"token": tokenizer.id_to_token(entry), "share": int(counts_V[entry]) / num_tokens} for entry in frequent
        ],
    }


def render_corpus(corpus: dict[str, Any]) -> str:
    lines = [
        f"{corpus['folder']}, {corpus['split']}: {corpus['documents']:,} documents, {corpus['sentences']:,} sentences, "
        f"{corpus['tokens']:,} tokens",
        f"[UNK] {corpus['unknown_share']:.3%} of the tokens; {corpus['unused_entries']:,} entries of the vocabulary "
        "never occur",
        f"at sequence length {corpus['sequence_length']}: {corpus['samples_per_epoch']:,} samples an epoch, "
        f"{corpus['padding_share']:.1%} padding (of the first {corpus['samples_looked_at']:,})",
    ]
    for name in ("sentences_per_document", "tokens_per_sentence", "tokens_per_sample"):
        lines += ["", *_bars(name.replace("_", " "), corpus[name])]
    rules = corpus["broken_rules"] or ["kept by all of them"]
    frequent = (f"{entry['token']} {entry['share']:.2%}" for entry in corpus["frequent_tokens"])
    lines += ["", f"rules of pairs and masks, first {corpus['samples_looked_at']:,} samples: {'; '.join(rules)}"]
    return "\n".join([*lines, "", "most frequent: " + "  ".join(frequent)])


def histogram(parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """Whole numbers from 1 on, counted in bins that double: 1, 2–3, 4–7, …"""
    counts, total, least, most = np.zeros(64, np.int64), 0, None, 0
    for part in parts:
        counts += np.bincount(np.frexp(part)[1] - 1, minlength=64)
        total += int(part.sum())
        least = int(part.min()) if least is None else min(least, int(part.min()))
        most = max(most, int(part.max()))
    bins = [
        {"from": 2**power, "to": 2 ** (power + 1) - 1, "count": count}
        for power, count in enumerate(counts.tolist())
        if least is not None and least < 2 ** (power + 1) and most >= 2**power
    ]
    return {"mean": total / max(int(counts.sum()), 1), "min": least, "max": most, "bins": bins}


def _bars(title: str, numbers: dict[str, Any]) -> list[str]:
    most = max(entry["count"] for entry in numbers["bins"])
    lines = [f"{title}: mean {numbers['mean']:,.1f}, from {numbers['min']:,} to {numbers['max']:,}"]
    for entry in numbers["bins"]:
        bar = "█" * -(-entry["count"] * BAR_WIDTH // most)
        lines.append(f"  {entry['from']:>9,} – {entry['to']:<9,} {entry['count']:>13,}  {bar}".rstrip())
    return lines


# The rules


def count_samples(samples: Samples, positions: range) -> dict[str, int]:
    """What the samples at these positions hold, counted; `broken_rules` says what of it may not be.

    A chunk of one sentence can have no next one, so it is counted apart (`single`) from those that draw (`divisible`).
    """
    special, most = samples.shards.special_ids, samples.config.max_predictions
    never = np.array([special.pad, special.cls, special.sep])
    sums: dict[str, int] = {}
    for part in _parts(positions):
        epoch_B, index_B = samples.order.locate(np.array(part))
        segments = samples.order.segments(epoch_B, index_B)
        batch = {name: tensor.numpy() for name, tensor in samples.batch(part).items()}
        num_tokens_B = batch["attention_mask"].sum(1)
        is_used_BM = batch["mlm_labels"] != IGNORED_LABEL
        labels = batch["mlm_labels"][is_used_BM]
        stands = np.take_along_axis(batch["input_ids"], batch["mlm_positions"], axis=1)[is_used_BM]
        wanted_B = np.clip(np.rint(num_tokens_B * samples.config.mask_probability), 1, most)
        wanted_B = np.minimum(wanted_B, segments.num_tokens_BS.sum(1))
        counts: dict[str, Any] = {
            "samples": len(part),
            "tokens": num_tokens_B.sum(),
            "too_long": (num_tokens_B > samples.sequence_length).sum(),
            "predictions": len(labels),
            "wanted_predictions": wanted_B.sum(),
            "too_many_predictions": (is_used_BM.sum(1) > wanted_B).sum(),
            "masked": (stands == special.mask).sum(),
            "kept": (stands == labels).sum(),
            "special_predicted": np.isin(labels, never).sum(),
        }
        if samples.order.pairs:
            a_document_B, b_document_B = (
                _document_of_token(samples, segments.first_token_BS[:, side]) for side in (0, 1)
            )
            is_single_B = samples.order.chunk_sizes(epoch_B, index_B) == 1
            counts |= {
                "single": is_single_B.sum(),
                "single_next": (is_single_B & ~segments.is_random_B).sum(),
                "divisible": (~is_single_B).sum(),
                "divisible_next": (~is_single_B & ~segments.is_random_B).sum(),
                "wrong_document": ((a_document_B != b_document_B) != segments.is_random_B).sum(),
                "empty_side": (segments.num_tokens_BS == 0).any(1).sum(),
            }
        for name, count in counts.items():
            sums[name] = sums.get(name, 0) + int(count)
    return sums


def broken_rules(counts: dict[str, int], whole_words: bool = False, tolerance: float = 0.005) -> list[str]:
    """A line for each rule that the counted samples do not keep. `tolerance` is for shares (0.005: half a point); it
    wants 100,000 samples. Whole words may leave some predictions unused."""
    never = {
        "too_long": "are longer than the sequence length",
        "too_many_predictions": "have more predictions than are due",
        "special_predicted": "predictions are of special tokens",
        "single_next": "one-sentence chunks are not negatives",
        "wrong_document": "negatives are of one document, or positives of two",
        "empty_side": "have an empty A or B",
    }
    found = [f"{counts[name]:,} {what}" for name, what in never.items() if counts.get(name)]
    if not whole_words and counts["predictions"] != counts["wanted_predictions"]:
        found.append(f"{counts['predictions']:,} predictions, {counts['wanted_predictions']:,} are due")
    replaced = counts["predictions"] - counts["masked"] - counts["kept"]
    shares = [
        ("masked", counts["masked"], counts["predictions"], 0.8),
        ("kept", counts["kept"], counts["predictions"], 0.1),
        ("replaced", replaced, counts["predictions"], 0.1),
    ]
    if "divisible" in counts:
        shares.append(("IsNext of chunks of two sentences or more", counts["divisible_next"], counts["divisible"], 0.5))
    for name, count, total, expected in shares:
        if abs(count / max(total, 1) - expected) > tolerance:
            found.append(f"{name}: {count / max(total, 1):.2%} of {total:,}, {expected:.0%} are due")
    return found


def _tokenizer(shards: Shards) -> Tokenizer:
    return Tokenizer.from_file(str(shards.tokenizer_folder / TOKENIZER_FILE))


def _document_of_token(samples: Samples, token: np.ndarray) -> np.ndarray:
    return samples.order.document_of(np.searchsorted(samples.shards.token_starts, token, side="right") - 1)


def _sample_lengths(samples: Samples, positions: range) -> np.ndarray:
    """Tokens with [CLS] and [SEP]."""
    segments = samples.order.segments(*samples.order.locate(np.array(positions)))
    return segments.num_tokens_BS.sum(1) + samples.sequence_length - samples.order.max_tokens


def _parts(positions: range) -> Iterator[range]:
    return (positions[first : first + SAMPLES_AT_ONCE] for first in range(0, len(positions), SAMPLES_AT_ONCE))


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[first : first + SLICE] for first in range(0, len(array), SLICE))


def _differences(starts: np.ndarray) -> Iterator[np.ndarray]:
    return (np.diff(starts[first : first + SLICE + 1]) for first in range(0, len(starts) - 1, SLICE))
