"""Where each head of an encoder looks, and what its layers hold: read as they are, in fp32, without dropout.

B batch, T tokens, H heads, L chosen layers, D width. Layers and heads count from 0; hidden state 0 is the embedding
output, hidden state k+1 the output of layer k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from mslt.errors import MsltError
from mslt.evaluate.opening import (
    locate,
    open_config,
    open_fitting_tokenizer,
    open_model,
    refuse_without_layers,
    vocabulary_difference,
)
from mslt.evaluate.similarity import LinearCka, js_sums
from mslt.models import families


@dataclass(frozen=True)
class Encoder:
    """`name` is what the user wrote, `source` what was opened."""

    name: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return int(self.model.config.num_attention_heads)


@dataclass(frozen=True)
class Reading:
    """What an encoder does with a batch: of each chosen layer the attention [B, H, T, T]; the embedding output and the
    output of each chosen layer, [B, T, D]."""

    attentions_LBHTT: list[torch.Tensor]
    hidden_LBTD: list[torch.Tensor]


def open_encoder(argument: str, device: torch.device) -> Encoder:
    """`CKPT` or `CKPT@LAYERS`, like 6-11 or 0,3,5-7. MsltError for layers that it has not."""
    checkpoint, at, written = argument.rpartition("@")
    if not at or Path(argument).exists():
        checkpoint, at, written = argument, "", ""
    source, _ = locate(checkpoint)
    config = open_config(source)
    layers = parse_layers(written, config.num_hidden_layers, argument) if at else range(config.num_hidden_layers)
    tokenizer = open_fitting_tokenizer(config, source)
    model, missing = open_model(source, AutoModel, attn_implementation="eager")
    refuse_without_layers(source, missing)
    return Encoder(argument, source, model.to(device), tokenizer, tuple(layers))


def parse_layers(written: str, depth: int, argument: str) -> tuple[int, ...]:
    """`6-11` or `0,3,5-7`: from 0, ends included, in the order written."""
    layers: list[int] = []
    for part in written.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise MsltError(
                f"{argument}: {part.strip()!r} is no layer or range of layers; write like @6-11 or @0,3,5-7"
            )
        if int(last or first) >= depth:
            raise MsltError(f"{argument}: there is no layer {last or first}; it has {depth}, 0 to {depth - 1}")
        layers.extend(range(int(first), int(last or first) + 1))
    return tuple(layers)


def tokenize(encoder: Encoder, texts: list[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """ids and mask [B, T] with special tokens, and how many of the texts were cut to `max_tokens`."""
    lengths = [len(ids) for ids in encoder.tokenizer(texts, verbose=False)["input_ids"]]
    cut = encoder.tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return cut["input_ids"], cut["attention_mask"], sum(length > max_tokens for length in lengths)


@torch.inference_mode()
def read(encoder: Encoder, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, *layers: Sequence[int]) -> list[Reading]:
    """One reading for each of the choices of layers, of one forward pass. MsltError where that is not finite."""
    device = encoder.model.device
    out = encoder.model(input_ids_BT.to(device), mask_BT.to(device), output_attentions=True, output_hidden_states=True)
    if not out.last_hidden_state.isfinite().all():
        raise MsltError(
            f"{encoder.name}: what it computes is not finite; its weights are damaged, or training diverged"
        )
    return [
        Reading(
            [out.attentions[k] for k in chosen], [out.hidden_states[0], *(out.hidden_states[k + 1] for k in chosen)]
        )
        for chosen in layers
    ]


@dataclass(frozen=True)
class TextMaps:
    """Attention in one text, [L, H, T, T] on the CPU: rows are tokens that look, columns those that are looked at.
    `is_special_T` marks [CLS], [SEP] and their like."""

    name: str
    tokens: list[str]
    is_special_T: torch.Tensor
    layers: tuple[int, ...]
    weights_LHTT: torch.Tensor
    was_cut: bool


def text_maps(encoder: Encoder, text: str) -> TextMaps:
    """MsltError for a text without tokens."""
    input_ids, mask, num_cut = tokenize(encoder, [text], families.num_positions(encoder.model.config))
    ids = input_ids[0].tolist()
    special = torch.tensor(encoder.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)).bool()
    if special.all():
        raise MsltError(f"--text {text!r}: holds no token of {encoder.name}'s vocabulary; give a sentence")
    (reading,) = read(encoder, input_ids, mask, encoder.layers)
    weights = torch.stack([layer[0] for layer in reading.attentions_LBHTT]).cpu()
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    return TextMaps(encoder.name, tokens, special, encoder.layers, weights, bool(num_cut))


def summarize(weights_TT: torch.Tensor, is_special_T: torch.Tensor) -> dict[str, float]:
    """Of one head, means over the tokens that look: entropy in bits, and how much of the weight goes to the token
    itself, to its neighbours, and to special tokens."""
    p_TT = weights_TT.double()
    away_TT = (torch.arange(len(p_TT))[:, None] - torch.arange(len(p_TT))).abs()
    return {
        "entropy_bits": (torch.special.entr(p_TT).sum(-1).mean() / torch.log(torch.tensor(2.0))).item(),
        "itself": p_TT.diagonal().mean().item(),
        "neighbours": (p_TT * (away_TT == 1)).sum(-1).mean().item(),
        "special": p_TT[:, is_special_T].sum(-1).mean().item(),
    }


@dataclass(frozen=True)
class Likeness:
    """How alike the chosen layers of two encoders are, by `names` and `layers`: `js_LK` where they look, `cka`
    [L + 1, K + 1], the embedding output first, what they hold; None of what was not asked for. `cka_of_noise` is what
    states without anything in common would show."""

    names: tuple[str, str]
    layers: tuple[tuple[int, ...], tuple[int, ...]]
    js_LK: torch.Tensor | None
    cka: torch.Tensor | None
    cka_of_noise: float | None
    num_texts: int
    num_tokens: int
    num_cut: int


def compare(
    first: Encoder,
    second: Encoder,
    texts: Sequence[str],
    batch_size: int,
    measures: Sequence[str],
    progress: Callable[[int, int], None],
) -> Likeness:
    """`measures`: js, cka, or both. All tokens of all texts count alike, special ones too. `second` may be `first`.

    `progress` is told how many texts are done. MsltError for encoders that do not tokenize alike, or, for js, have
    other numbers of heads."""
    _refuse_unlike(first, second, measures)
    max_tokens = min(families.num_positions(encoder.model.config) for encoder in (first, second))
    js, cka, num_tokens, num_cut = torch.zeros(len(first.layers), len(second.layers)).double(), LinearCka(), 0, 0
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        ids, mask, cut = tokenize(first, batch, max_tokens)
        if not torch.equal(ids, tokenize(second, batch, max_tokens)[0]):
            raise MsltError(f"{first.name}, {second.name}: their tokenizers cut the text into unlike tokens, with the "
                            "same vocabulary; compare checkpoints of one tokenizer")  # fmt: skip
        if second.source == first.source:
            one, other = read(first, ids, mask, first.layers, second.layers)
            other = one if first.layers == second.layers else other
        else:
            (one,), (other,) = read(first, ids, mask, first.layers), read(second, ids, mask, second.layers)
        if "js" in measures:
            js += js_sums(one.attentions_LBHTT, other.attentions_LBHTT, mask.bool())
        if "cka" in measures:
            cka.add(one.hidden_LBTD, other.hidden_LBTD, mask.bool())
        num_tokens, num_cut = num_tokens + int(mask.sum()), num_cut + cut
        progress(start + len(batch), len(texts))
    return Likeness(
        (first.name, second.name),
        (first.layers, second.layers),
        js / num_tokens if "js" in measures else None,
        cka.values() if "cka" in measures else None,
        cka.of_noise() if "cka" in measures else None,
        len(texts),
        num_tokens,
        num_cut,
    )


def _refuse_unlike(first: Encoder, second: Encoder, measures: Sequence[str]) -> None:
    difference = vocabulary_difference(first.tokenizer.get_vocab(), second.tokenizer.get_vocab())
    if difference is not None:
        raise MsltError(f"{first.name}, {second.name}: have different vocabularies ({difference}), so that their "
                        "tokens cannot be held against each other; compare checkpoints of one tokenizer")  # fmt: skip
    if "js" in measures and first.num_heads != second.num_heads:
        raise MsltError(f"{first.name}, {second.name}: have {first.num_heads} and {second.num_heads} heads, so that no "
                        "head has its fellow; compare their hidden states alone, with --measure cka")  # fmt: skip
