"""SQuAD: find the answer's span in its context, or say that there is none (Devlin et al. 2019, sections 4.2 and 4.3;
what the paper leaves open as in its run_squad.py).

B windows of a batch, T tokens of a window, C tokens of a context, W windows of a context. Position 0 of a window is its
[CLS], which stands for "no answer". A context too long for one window is read in several.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mslt.errors import MsltError
from mslt.evaluate.device import device_name
from mslt.evaluate.fine_tune import Batch, FineTuning, Tell, counted, fine_tune, num_steps, predict
from mslt.evaluate.squad_data import Question, Version
from mslt.evaluate.squad_scores import at_threshold, score, tuned_scores
from mslt.files import write_json
from mslt.models.checkpoint import save_fine_tuned
from mslt.provenance import provenance

N_BEST = 20  # starts, and ends, of a window that are looked at
LONGEST_ANSWER_TOKENS = 30
# (learning rate, batch size, epochs) of Devlin et al. 2019: section 4.2 for 1.1, 4.3 for 2.0.
DEVLINS: dict[Version, tuple[float, int, int]] = {"1.1": (5e-5, 32, 3), "2.0": (5e-5, 48, 2)}
_AT_ONCE = 1000  # texts

Collate = Callable[[Sequence["Window"]], Batch]


@dataclass(frozen=True)
class Shape:
    """A window's tokens; how many tokens apart windows of one context begin; tokens of a question that are kept."""

    sequence_length: int = 384
    stride: int = 128
    question_tokens: int = 64


@dataclass(frozen=True)
class Text:
    """`ids` [C], `offsets` [C, 2]: the characters of each token, end excluded."""

    ids: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Frame:
    """The special tokens before, between and behind the two texts; types of a question's tokens and a context's."""

    before: tuple[list[int], list[int]]
    between: tuple[list[int], list[int]]
    behind: tuple[list[int], list[int]]
    question_type: int
    context_type: int

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _ in (self.before, self.between, self.behind))


@dataclass(frozen=True)
class Window:
    """`ids`, `types` [T] of one question and a piece of its context, whose C tokens begin at position `at`; `offsets`
    [C, 2] are theirs in the context, `has_most_context` [C] is true where no other window shows more on both sides of
    the token. `start` and `end` are the answer's first and last position, 0 where the piece does not hold all of it."""

    question_index: int
    ids: np.ndarray
    types: np.ndarray
    at: int
    offsets: np.ndarray
    has_most_context: np.ndarray
    start: int
    end: int


@dataclass(frozen=True)
class Prediction:
    """Per id: the best span's text, and how much more the model thinks of no answer than of it."""

    answers: dict[str, str]
    null_odds: dict[str, float]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Question],
    dev: Sequence[Question],
    version: Version,
    shape: Shape,
    settings: FineTuning,
    tell: Tell = lambda doing, done, total: None,
) -> tuple[dict[str, Any], Prediction]:
    """Fine-tune in place on `train`, whose answers stand where they say (`with_placed_answers`), and score on `dev`.
    `tell` is called with (what, batches done, batches in all)."""
    tell("cutting windows", 0, 1)
    rows = windows_of(train, tokenizer, shape)
    started = time.perf_counter()
    collate = counted(collator(model, tokenizer, labelled=True), "training", num_steps(len(rows), settings), tell)
    for _ in fine_tune(model, rows, collate, settings):
        pass
    trained = time.perf_counter()
    asked = windows_of(dev, tokenizer, shape)
    said = ask(model, tokenizer, asked, settings, tell)
    prediction = decide(dev, asked, said)
    seconds = {"train": trained - started, "predict": time.perf_counter() - trained}
    found = {
        **scores(dev, prediction, version),
        "windows": {"train": len(rows), "dev": len(asked)},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "device": device_name(model.device),
    }
    return found, prediction


def warnings_of(train: Sequence[Question], dev: Sequence[Question], num_left_out: int) -> list[str]:
    """What a reader of the scores should know of the data."""
    found = []
    if num_left_out:
        found.append(
            f"{num_left_out:,} questions have no answer that stands where its answer_start says: not trained on"
        )
    num_shared = len({question.id for question in train} & {question.id for question in dev})
    if num_shared:
        found.append(f"{num_shared:,} questions of dev are trained on: the scores say nothing of new ones")
    return found


def write(
    out: Path,
    result: dict[str, Any],
    prediction: Prediction,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Write predictions.json at threshold 0 in the official format, of 2.0 also null_odds.json and answers.json (the
    best span whatever the odds), `model` where there is one, and last result.json: returned, with its provenance."""
    if result["settings"]["version"] == "2.0":
        write_json(out / "null_odds.json", prediction.null_odds)
        write_json(out / "answers.json", prediction.answers)
        write_json(out / "predictions.json", at_threshold(prediction.answers, prediction.null_odds, 0.0))
    else:
        write_json(out / "predictions.json", prediction.answers)
    result = {**result, "provenance": provenance()}
    if model is not None:
        save_fine_tuned(out / "model", model, tokenizer, {"task": "SQuAD", "settings": result["settings"]})
    write_json(out / "result.json", result)
    return result


def scores(dev: Sequence[Question], prediction: Prediction, version: Version) -> dict[str, Any]:
    """At threshold 0; of 2.0 also tuned on `dev`, and what saying "no answer" always would score."""
    if version == "1.1":
        return {"scores": score(dev, prediction.answers, version)}
    return {
        "scores": score(dev, at_threshold(prediction.answers, prediction.null_odds, 0.0), version),
        "tuned_on_dev": tuned_scores(dev, prediction.answers, prediction.null_odds),
        "all_empty": score(dev, {question.id: "" for question in dev}, version)["exact"],
    }


# Windows


def windows_of(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, shape: Shape) -> list[Window]:
    """All windows, in the order of the questions. The first answer is the label. MsltError where the tokenizer tells no
    offsets, does not begin with its [CLS], or a window has no room for `stride` tokens of the context."""
    frame = frame_of(tokenizer)
    refuse_narrow(shape, frame)
    texts = tokenized([question.text.strip() for question in questions], tokenizer)
    contexts = list(dict.fromkeys(question.context for question in questions))
    of_context = dict(zip(contexts, tokenized(contexts, tokenizer), strict=True))
    return [
        window
        for index, question in enumerate(questions)
        for window in cut(index, question, texts[index].ids[: shape.question_tokens], of_context[question.context],
                          frame, shape)
    ]  # fmt: skip


def cut(
    index: int, question: Question, question_ids: np.ndarray, context: Text, frame: Frame, shape: Shape
) -> Iterator[Window]:
    """The windows of one question."""
    before = np.concatenate([frame.before[0], question_ids, frame.between[0]]).astype(np.int32)
    types = [*frame.before[1], *[frame.question_type] * len(question_ids), *frame.between[1]]
    room = shape.sequence_length - frame.num_tokens - len(question_ids)
    starts = window_starts(len(context.ids), room, shape.stride)
    shows_most = most_context(len(context.ids), starts, room)
    first, last = answer_tokens(question, context)
    for number, start in enumerate(starts):
        ids = context.ids[start : start + room]
        holds = start <= first and last < start + len(ids)
        yield Window(
            question_index=index,
            ids=np.concatenate([before, ids, frame.behind[0]]).astype(np.int32),
            types=np.array([*types, *[frame.context_type] * len(ids), *frame.behind[1]], np.int8),
            at=len(before),
            offsets=context.offsets[start : start + room],
            has_most_context=shows_most[start : start + room] == number,
            start=len(before) + first - start if holds else 0,
            end=len(before) + last - start if holds else 0,
        )


def window_starts(num_tokens: int, room: int, stride: int) -> range:
    """The first context token of each window: every `stride` tokens until one holds the last token."""
    return range(0, max(num_tokens - room, 0) + stride, stride)


def most_context(num_tokens: int, starts: range, room: int) -> np.ndarray:
    """[C], the number of the window that shows the most of what is around each token: the lesser of its two sides, and
    a hundredth of the window's length besides, which decides between equals (run_squad.py, _check_is_max_context)."""
    token_C, start_W1 = np.arange(num_tokens), np.array(starts)[:, None]
    end_W1 = np.minimum(start_W1 + room, num_tokens)
    sides_WC = np.minimum(token_C - start_W1, end_W1 - 1 - token_C)
    return np.where(sides_WC >= 0, sides_WC + 0.01 * (end_W1 - start_W1), -np.inf).argmax(axis=0)


def answer_tokens(question: Question, context: Text) -> tuple[int, int]:
    """First and last token with a character of the first answer; (-1, -1) where there is none."""
    if not question.answers:
        return -1, -1
    answer = question.answers[0]
    start, end = context.offsets[:, 0], context.offsets[:, 1]
    touched = np.flatnonzero((start < answer.start + len(answer.text)) & (end > answer.start) & (end > start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else (-1, -1)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """How this tokenizer puts two texts together, seen at a pair of one letter each."""
    if not tokenizer.is_fast:
        raise MsltError(
            f"{type(tokenizer).__name__}: a slow tokenizer, which does not tell where its tokens stand in the text; "
            "give a folder with a tokenizer.json by --tokenizer"
        )
    pair = tokenizer("a", "a", return_token_type_ids=True)
    of = pair.sequence_ids()
    question, context = ([place for place, which in enumerate(of) if which == text] for text in (0, 1))
    cuts = ((0, question[0]), (question[-1] + 1, context[0]), (context[-1] + 1, len(of)))
    ids, types = pair["input_ids"], pair["token_type_ids"]
    if ids[0] != tokenizer.cls_token_id:
        raise MsltError(
            f"{type(tokenizer).__name__}: does not begin a pair with its [CLS], which stands for no answer; give a "
            "BERT, RoBERTa or ELECTRA checkpoint"
        )
    before, between, behind = ((ids[first:end], types[first:end]) for first, end in cuts)
    return Frame(before, between, behind, types[question[0]], types[context[0]])


def refuse_narrow(shape: Shape, frame: Frame) -> None:
    """MsltError where windows leave a gap between them, or show nothing of the context."""
    room = shape.sequence_length - frame.num_tokens - shape.question_tokens
    if shape.stride >= room:
        raise MsltError(
            f"--stride {shape.stride}: a window of --sequence-length {shape.sequence_length} has room for {room} "
            f"tokens of the context (beside {shape.question_tokens} of the question and {frame.num_tokens} special), "
            "and windows must overlap; give a lower --stride or --question-tokens, or a larger --sequence-length"
        )


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Without special tokens, and whole."""
    found = []
    for first in range(0, len(texts), _AT_ONCE):
        of = tokenizer(
            list(texts[first : first + _AT_ONCE]),
            add_special_tokens=False, truncation=False, padding=False, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        found += [
            Text(np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2))
            for ids, offsets in zip(of["input_ids"], of["offset_mapping"], strict=True)
        ]
    return found


# Batches


def collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labelled: bool) -> Collate:
    """Makes batches padded on the right to their longest window: ids, attention mask, types where the model has more
    than one, [B, T]; with labels also start and end positions [B]."""
    has_types = getattr(model.config, "type_vocab_size", 0) > 1

    def collate(rows: Sequence[Window]) -> Batch:
        batch = padded([(row.ids, row.types) for row in rows], tokenizer.pad_token_id, has_types)
        if labelled:
            batch["start_positions"] = torch.tensor([row.start for row in rows])
            batch["end_positions"] = torch.tensor([row.end for row in rows])
        return batch

    return collate


def padded(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int, has_types: bool, num_tokens: int | None = None
) -> Batch:
    """Ids and types [T] of each row, padded on the right to the longest or to `num_tokens`: [B, T], and the mask."""
    T = num_tokens or max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), T), pad_id)
    types_BT, mask_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for index, (ids, types) in enumerate(rows):
        ids_BT[index, : len(ids)] = torch.from_numpy(ids)
        types_BT[index, : len(ids)] = torch.from_numpy(types)
        mask_BT[index, : len(ids)] = 1
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return {**batch, "token_type_ids": types_BT} if has_types else batch


# Predictions


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    settings: FineTuning,
    tell: Tell = lambda doing, done, total: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Start and end logits of every window, [T] each. MsltError where they are not finite."""
    batches = -(-len(windows) // settings.batch_size)
    collate = counted(collator(model, tokenizer, labelled=False), "predicting", batches, tell)
    said = predict(model, windows, collate, settings.batch_size, settings.precision, lambda window: len(window.ids))
    logits = [
        (start[: len(window.ids)].numpy(), end[: len(window.ids)].numpy())
        for window, (start, end) in zip(windows, said, strict=True)
    ]
    if not all(np.isfinite(start).all() and np.isfinite(end).all() for start, end in logits):
        raise MsltError(f"the fine-tuned model's logits are not finite (--learning-rate {settings.learning_rate}, "
                        f"--precision {settings.precision}): it diverged; give a lower rate, or fp32")  # fmt: skip
    return logits


def decide(
    questions: Sequence[Question], windows: Sequence[Window], logits: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Prediction:
    """Devlin's write_predictions: a span scores its start logit and its end logit; the best of all windows is the
    answer. No answer scores the lowest that any window gives its [CLS]. Where no span is allowed the answer is `""`,
    with score 0."""
    answers = {question.id: "" for question in questions}
    null_odds = dict.fromkeys(answers, 0.0)
    pairs = zip(windows, logits, strict=True)
    for index, group in groupby(pairs, key=lambda pair: pair[0].question_index):
        question, of_question = questions[index], list(group)
        spans = [span for window, (start, end) in of_question for span in spans_of(window, start, end)]
        spans.sort(key=lambda span: -span[0])
        texts = ((best, question.context[first:end].strip()) for best, first, end in spans)
        best, answers[question.id] = next(((best, text) for best, text in texts if text), (0.0, ""))
        null_odds[question.id] = min(float(start[0] + end[0]) for _, (start, end) in of_question) - best
    return Prediction(answers, null_odds)


def spans_of(window: Window, start_T: np.ndarray, end_T: np.ndarray) -> list[tuple[float, int, int]]:
    """(score, first character, end character) of the spans between the `N_BEST` best starts and ends among the
    context's tokens, of LONGEST_ANSWER_TOKENS or fewer, that start at a token of which no other window shows more.

    run_squad.py takes the best among all of the window's tokens and then drops those of the question, which can leave
    none.
    """
    inside = slice(window.at, window.at + len(window.offsets))
    start_C, end_C = start_T[inside], end_T[inside]
    starts, ends = (np.argsort(-logits, kind="stable")[:N_BEST] for logits in (start_C, end_C))
    return [
        (float(start_C[start] + end_C[end]), int(window.offsets[start, 0]), int(window.offsets[end, 1]))
        for start in starts
        if window.has_most_context[start]
        for end in ends
        if start <= end < start + LONGEST_ANSWER_TOKENS
    ]
