"""SQuAD's own files: questions on paragraphs, with answers as text and place (Rajpurkar et al. 2016, 2018)."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_text

_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list"}
Version = Literal["1.1", "2.0"]
Split = Literal["train", "dev"]

# Questions, and of them answerable: Rajpurkar et al. 2016 (table 1 rounds), 2018 (table 2).
OFFICIAL = {
    ("1.1", "train"): (87_599, 87_599), ("1.1", "dev"): (10_570, 10_570),
    ("2.0", "train"): (130_319, 86_821), ("2.0", "dev"): (11_873, 5_928),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """`start` counts characters of the context, from 0."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """No `answers`: the context does not answer it (2.0 alone)."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...]


def read_file(path: Path, version: Version) -> list[Question]:
    """The questions of a file in SQuAD's JSON, in its order. MsltError where it is no such file, or of the other
    version."""
    questions, num_marked = [], 0
    for article, where in _items(_parsed(path), "data", str(path)):
        for paragraph, where_paragraph in _items(article, "paragraphs", where):
            context = _value(paragraph, "context", str, where_paragraph)
            for entry, where_entry in _items(paragraph, "qas", where_paragraph):
                question = _question(entry, context, where_entry)
                questions.append(question)
                if "is_impossible" in entry:
                    num_marked += 1
                    is_impossible = _value(entry, "is_impossible", bool, where_entry)
                    if is_impossible == bool(question.answers):
                        raise MsltError(f"{where_entry}: is_impossible is {str(is_impossible).lower()}, but it has "
                                        f"{len(question.answers)} answers; mend the file")  # fmt: skip
    if questions and version == "2.0" and not num_marked:
        raise MsltError(f"{path}: is SQuAD 1.1 (no question has is_impossible); give a file of 2.0, or --version 1.1")
    if version == "1.1" and num_marked:
        raise MsltError(f"{path}: is SQuAD 2.0 (questions have is_impossible); give a file of 1.1, or --version 2.0")
    return checked(questions, str(path), version)


def checked(questions: list[Question], source: str, version: Version) -> list[Question]:
    """The same. MsltError where there are none, where two have one id, or where one of 1.1 has no answer."""
    if not questions:
        raise MsltError(f"{source}: holds no question")
    times = Counter(question.id for question in questions)
    if len(times) < len(questions):
        twice = [id for id, count in times.items() if count > 1]
        raise MsltError(
            f"{source}: {len(twice):,} ids stand more than once ({', '.join(twice[:3])} …); predictions are told "
            "apart by them: mend the file"
        )
    empty = [question.id for question in questions if not question.answers]
    if version == "1.1" and empty:
        raise MsltError(
            f"{source}: {len(empty):,} questions without an answer ({', '.join(empty[:3])} …); every one of SQuAD 1.1 "
            "has one: mend the file, or give --version 2.0"
        )
    return questions


def refuse_lost_rows(questions: Sequence[Question], source: str, version: Version, split: Split) -> None:
    """MsltError where these are not as many as the official split has, answerable and not."""
    found = len(questions), sum(bool(question.answers) for question in questions)
    if found != OFFICIAL[version, split]:
        (total, answerable), (has, has_answerable) = OFFICIAL[version, split], found
        raise MsltError(
            f"{source}: {has:,} questions, {has_answerable:,} of them answerable; the official {split} split of SQuAD "
            f"{version} has {total:,} and {answerable:,}: rows were lost, or of data that is a part say --subset"
        )


def with_placed_answers(questions: Iterable[Question]) -> tuple[list[Question], int]:
    """To train on: every question with one answer, the first that stands in the context where it says, or none where
    it has none; and how many were left out, since no answer of theirs does (Devlin's run_squad.py leaves them out)."""
    placed, num_left_out = [], 0
    for question in questions:
        here = [a for a in question.answers if question.context[a.start :].startswith(a.text) and a.text.strip()]
        if here or not question.answers:
            placed.append(replace(question, answers=tuple(here[:1])))
        else:
            num_left_out += 1
    return placed, num_left_out


def drawn(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """The first `count` of a keyed order: a smaller draw is part of a larger one."""
    order = np.argsort(keyed.bits(seed, "squad_questions", np.arange(len(questions))), kind="stable")
    return [questions[index] for index in order[:count]]


def digest(questions: Iterable[Question]) -> str:
    """One hash for one set of questions in one order, wherever it was read from."""
    rows = [[q.id, q.text, q.context, [[a.text, a.start] for a in q.answers]] for q in questions]
    return sha256_text(canonical_json(rows))


def read_by_id(path: Path, kinds: tuple[type, ...], what: str) -> dict[str, Any]:
    """A file of predictions or odds: {id: value}. MsltError where it is none, or a value is not of these kinds, or not
    finite."""
    said = _parsed(path)
    wrong = [id for id, value in said.items() if not isinstance(value, kinds) or isinstance(value, bool)
             or (isinstance(value, float) and not math.isfinite(value))]  # fmt: skip
    if wrong:
        raise MsltError(f"{path}: the value of {wrong[0]} is not {what}; it must be {{id: {what}, …}}")
    return said


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MsltError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise MsltError(f"{path}: is no text in UTF-8 (byte {error.start:,}); give SQuAD's own JSON") from None
    if not text.strip():
        raise MsltError(f"{path}: is empty; give SQuAD's own JSON")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise MsltError(
            f"{path}: is no JSON (line {error.lineno}: {error.msg}); give SQuAD's own file (train-v2.0.json, "
            "dev-v2.0.json), not a table made of it"
        ) from None
    if not isinstance(parsed, dict):
        raise MsltError(f"{path}: its JSON is a {type(parsed).__name__}, not an object; give SQuAD's own file")
    return parsed


def _question(entry: dict[str, Any], context: str, where: str) -> Question:
    answers = tuple(
        Answer(_value(answer, "text", str, place), _value(answer, "answer_start", int, place))
        for answer, place in _items(entry, "answers", where)
    )
    return Question(_value(entry, "id", str, where), _value(entry, "question", str, where), context, answers)


def _items(parent: dict[str, Any], key: str, where: str) -> Iterable[tuple[dict[str, Any], str]]:
    """Every object in the list `key`, with its place."""
    for index, item in enumerate(_value(parent, key, list, where)):
        place = f"{where}{'.' if where.endswith(']') else ': '}{key}[{index}]"
        if not isinstance(item, dict):
            raise MsltError(f"{place}: is {json.dumps(item)[:40]}, not an object; give SQuAD's own JSON")
        yield item, place


def _value(parent: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in parent:
        raise MsltError(f"{where}: has no {key}; give SQuAD's own JSON (data, paragraphs, context, qas, id, question, "
                        "answers, text, answer_start)")  # fmt: skip
    value = parent[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MsltError(f"{where}: its {key} is {json.dumps(value)[:40]}, not {_KINDS[kind]}; give SQuAD's own JSON")
    return value
