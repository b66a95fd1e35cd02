"""Can the input word be read back? An MLM head on each frozen hidden state, trained where words are half hidden, and
asked where nothing is ("The convexity of BERT", figure 4).

B batch, T tokens, D width, E width of the word embeddings, M chosen tokens, L hidden states (layers + 1), V vocabulary,
P held-out passages.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate.intervals import clustered
from mslt.evaluate.opening import (
    digest,
    open_config,
    open_fitting_tokenizer,
    open_model,
    refuse_without_layers,
    tokenizer_digest,
)
from mslt.evaluate.positions import refuse_over_positions
from mslt.evaluate.result import FORMAT, finished
from mslt.files import canonical_json, sha256_text, write_json
from mslt.heads.mlm_head import new_mlm_head, without_components
from mslt.models import families
from mslt.models.layer_stack import iter_hidden, iter_layers
from mslt.models.loss import head_sums
from mslt.provenance import provenance

HeadInit = Literal["random", "pretrained"]
SCORED_TOKENS = 2048  # at once
FOLDER = "mlm"


@dataclass(frozen=True)
class Settings:
    """`dropout` is the probability with which a component of a chosen word's embedding is 0, without rescaling (0.3: as
    Zhou et al. 2019); `chosen_share` of the tokens that are not special are chosen. All heads begin alike, from the
    checkpoint's own head where `head` is pretrained."""

    dropout: float = 0.3
    steps: int = 500
    batch_size: int = 32
    max_tokens: int = 128
    learning_rate: float = 1e-3
    chosen_share: float = 0.15
    heldout_share: float = 0.1
    head: HeadInit = "random"
    seed: int = 0


@dataclass(frozen=True)
class Windows:
    """Token ids, with special tokens, of at most so many tokens each; `is_special_V` marks those. `passage_of` numbers
    the passages that the held-out windows are of."""

    train: list[list[int]]
    heldout: list[list[int]]
    passage_of: list[int]
    is_special_V: np.ndarray
    pad_id: int


def cut_windows(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], settings: Settings) -> Windows:
    """Passages one after the other, each in windows of its own; a share of the passages is held out. MsltError where
    they are too few to part, or hold no known word."""
    if not tokenizer.is_fast:
        raise MsltError(f"{tokenizer.name_or_path}: its tokenizer cuts no windows (it has no tokenizer.json); save it "
                        "as a fast one")  # fmt: skip
    is_heldout = keyed.uniform(settings.seed, "heldout_passage", np.arange(len(passages))) < settings.heldout_share
    special = set(tokenizer.all_special_ids)  # and so what no entry stands for
    parts: dict[bool, list[tuple[list[int], int]]] = {False: [], True: []}
    for which, found in parts.items():
        texts = [text for text, held in zip(passages, is_heldout.tolist(), strict=True) if held == which]
        if texts:
            cut = tokenizer(texts, truncation=True, max_length=settings.max_tokens, return_overflowing_tokens=True)
            windows = zip(cut["input_ids"], cut["overflow_to_sample_mapping"], strict=True)
            found += [(ids, passage) for ids, passage in windows if not special.issuperset(ids)]
    if not all(parts.values()):
        raise MsltError(f"--text: {len(passages)} passages are too few to train on some and hold out others, or hold "
                        "no word that the tokenizer knows; give more")  # fmt: skip
    train, (heldout, passage_of) = [ids for ids, _ in parts[False]], zip(*parts[True], strict=True)
    is_special_V = np.zeros(max(len(tokenizer), max(map(max, train)) + 1), bool)
    is_special_V[list(special)] = True
    return Windows(train, list(heldout), list(passage_of), is_special_V, tokenizer.pad_token_id)


def padded(windows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, T]."""
    longest = max(map(len, windows))
    ids = torch.tensor([[*window, *[pad_id] * (longest - len(window))] for window in windows])
    mask = torch.tensor([[1] * len(window) + [0] * (longest - len(window)) for window in windows])
    return ids, mask


def train_heads(
    model: PreTrainedModel,
    heads: nn.ModuleList,
    windows: Windows,
    settings: Settings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """In place; the model stays as it is. All heads learn from one pass, each by its own loss."""
    optimizer = torch.optim.AdamW(heads.parameters(), lr=settings.learning_rate)
    words_VE = families.words_of(model).weight.detach()
    for step, batch in enumerate(_batches(windows.train, settings)):
        ids_BT, mask_BT = padded(batch, windows.pad_id)
        chosen_BT, hidden_states = walk_dropped(model, ids_BT, mask_BT, windows.is_special_V, settings, step)
        labels_M = ids_BT[chosen_BT].to(model.device)
        if not len(labels_M):
            continue
        optimizer.zero_grad(set_to_none=True)
        for head, (_, h_BTD) in zip(heads, hidden_states, strict=True):
            loss = head_sums(head(h_BTD[chosen_BT.to(model.device)], words_VE), labels_M)[0]
            (loss / len(labels_M)).backward()
        optimizer.step()
        progress(step + 1, settings.steps)


def walk_dropped(
    model: PreTrainedModel,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    is_special_V: np.ndarray,
    settings: Settings,
    step: int,
) -> tuple[torch.Tensor, Iterator[tuple[int, torch.Tensor]]]:
    """Which tokens are chosen in this step [B, T], and all hidden states (k, [B, T, D]) with theirs dropped, without a
    graph."""
    row_B1, column_T = np.arange(len(ids_BT))[:, None], np.arange(ids_BT.shape[1])
    draw_BT = keyed.uniform(settings.seed, "chosen_word", step, row_B1, column_T)
    may_BT = mask_BT.bool().numpy() & ~is_special_V[ids_BT.numpy()]
    chosen_BT = torch.from_numpy((draw_BT < settings.chosen_share) & may_BT)
    words = families.words_of(model)
    token_M1 = np.arange(int(chosen_BT.sum()))[:, None]
    draw_ME = keyed.uniform(settings.seed, "embedding_dropout", step, token_M1, np.arange(words.embedding_dim))
    dropped_ME = torch.from_numpy(draw_ME < settings.dropout).to(model.device)
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)

    def walk() -> Iterator[tuple[int, torch.Tensor]]:
        with torch.no_grad():
            words_BTE = without_components(words(ids_BT), chosen_BT.to(model.device), dropped_ME)
            h_BTD = families.embed(model, ids_BT, words_BTE=words_BTE)
        yield 0, h_BTD
        yield from iter_layers(model, h_BTD, mask_BT, 0, lowest_graph_layer=len(families.layers(model)))

    return chosen_BT, walk()


def _batches(windows: Sequence[list[int]], settings: Settings) -> Iterator[list[list[int]]]:
    """`steps` batches, epoch after epoch, in a keyed order."""
    size = min(settings.batch_size, len(windows))
    per_epoch = len(windows) // size
    for step in range(settings.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            draws = keyed.bits(settings.seed, "mlm_probe_order", epoch, np.arange(len(windows)))
            order = np.argsort(draws, kind="stable").tolist()
        yield [windows[index] for index in order[place * size : (place + 1) * size]]


@torch.inference_mode()
def head_answers(
    model: PreTrainedModel, heads: nn.ModuleList, windows: Windows, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """For how many of a held-out passage's tokens a head's first choice is what stands there, nothing hidden, [L, P];
    and how many of its tokens are not special, [P]."""
    words_VE = families.words_of(model).weight
    num_passages = max(windows.passage_of) + 1
    right_LP, asked_P = torch.zeros(len(heads), num_passages, dtype=torch.int64), torch.zeros(num_passages).long()
    order = sorted(range(len(windows.heldout)), key=lambda index: len(windows.heldout[index]))
    is_special_V = torch.from_numpy(windows.is_special_V)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        ids_BT, mask_BT = padded([windows.heldout[index] for index in indices], windows.pad_id)
        passage_B = torch.tensor([windows.passage_of[index] for index in indices])
        asked_BT = (mask_BT.bool() & ~is_special_V[ids_BT]).to(model.device)
        ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
        labels_M = ids_BT[asked_BT]
        right_LBT = torch.zeros(len(heads), *asked_BT.shape, dtype=torch.bool, device=model.device)
        for k, h_BTD in iter_hidden(model, ids_BT, None, mask_BT):
            chosen = [heads[k](h_MD, words_VE).argmax(-1) for h_MD in h_BTD[asked_BT].split(SCORED_TOKENS)]
            right_LBT[k, asked_BT] = torch.cat(chosen) == labels_M
        right_LP.index_add_(1, passage_B, right_LBT.sum(-1).cpu())
        asked_P.index_add_(0, passage_B, asked_BT.sum(-1).cpu())
    has_any_P = asked_P > 0
    return right_LP[:, has_any_P].numpy(), asked_P[has_any_P].numpy()


def open_frozen(source: str, device: torch.device) -> PreTrainedModel:
    """The encoder alone, none of it to be trained."""
    model, missing = open_model(source, AutoModel)
    refuse_without_layers(source, missing)
    return model.requires_grad_(False).to(device)


def heads_for(model: PreTrainedModel, source: str, settings: Settings) -> nn.ModuleList:
    """One for each hidden state, all alike. MsltError where the checkpoint has no head to begin from."""
    heads = [new_mlm_head(model, settings.seed) for _ in range(model.config.num_hidden_layers + 1)]
    if settings.head == "pretrained":
        weights = pretrained_head(source)
        for head in heads:
            head.load_state_dict(weights)
    return nn.ModuleList(heads)


def pretrained_head(source: str) -> dict[str, torch.Tensor]:
    """The weights of its MLM head, as MlmHead's. MsltError where it has none, or one not tied to the word
    embeddings."""
    masked, missing = open_model(source, AutoModelForMaskedLM)
    if missing:
        raise MsltError(f"{source}: has no MLM head ({', '.join(missing[:3])} missing); take a checkpoint that was "
                        "saved with it, or let one be drawn: --mlm-head random")  # fmt: skip
    if not torch.equal(masked.get_output_embeddings().weight, families.words_of(masked).weight):
        raise MsltError(f"{source}: its MLM head has words of its own, not the word embeddings; let a head be drawn: "
                        "--mlm-head random")  # fmt: skip
    return {name: weight.detach() for name, weight in families.mlm_head_weights(masked).items()}


@dataclass(frozen=True)
class Planned:
    """Either there is a `result`, or `windows` to make it from, which is then to lie at `path`."""

    source: str
    settings: Settings
    path: Path
    described: dict[str, Any]
    windows: Windows | None
    result: dict[str, Any] | None


def plan_mlm(source: str, passages: Sequence[str], settings: Settings, folder: Path) -> Planned:
    """What lies in `folder` already is not made again. MsltError for what does not fit."""
    config = open_config(source)
    tokenizer = open_fitting_tokenizer(config, source)
    refuse_over_positions(config, source, settings.max_tokens, "--max-tokens")
    if not 0 <= settings.dropout <= 1:
        raise MsltError(f"--dropout {settings.dropout}: is a probability; give 0 to 1")
    described = {"format": FORMAT, "checkpoint": digest(source), "tokenizer": tokenizer_digest(tokenizer),
                 "text": sha256_text(canonical_json(list(passages))), **asdict(settings)}  # fmt: skip
    path = folder / f"dropout={settings.dropout:g}.json"
    before = finished(path, described)
    windows = cut_windows(tokenizer, passages, settings) if before is None else None
    return Planned(source, settings, path, described, windows, before)


def probe_mlm(planned: Planned, device: torch.device, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Train the heads and ask them. MsltError for a checkpoint without layers, or without the head to begin from."""
    if planned.windows is None:
        assert planned.result is not None
        return planned.result
    source, settings, windows = planned.source, planned.settings, planned.windows
    model = open_frozen(source, device)
    heads = heads_for(model, source, settings)
    train_heads(model, heads, windows, settings, progress)
    right_LP, asked_P = head_answers(model, heads, windows, settings.batch_size)
    intervals = [clustered(right_P, asked_P) for right_P in right_LP]
    result = {
        "settings": planned.described,
        "checkpoint": source,
        "task": f"dropout {settings.dropout:g}",
        "accuracy": (right_LP.sum(1) / asked_P.sum()).tolist(),
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "majority": _commonest_share(windows),
        "tokens": int(asked_P.sum()),
        "asked": asked_P.tolist(),
        "right": right_LP.tolist(),
        "windows": {"train": len(windows.train), "heldout": len(windows.heldout)},
        "trainable_per_layer": num_parameters(heads[0]),
        "provenance": provenance(),
    }
    planned.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(planned.path, result)
    return result


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _commonest_share(windows: Windows) -> float:
    """Of held-out tokens that are not special, how many are the commonest of the training windows."""
    train, heldout = (
        Counter(token for window in part for token in window if not windows.is_special_V[token])
        for part in (windows.train, windows.heldout)
    )
    return heldout[max(train, key=lambda token: train[token])] / heldout.total()
