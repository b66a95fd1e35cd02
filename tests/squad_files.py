"""SQuAD's files, made up: questions that a small encoder with the words of tests/encoders.py can learn."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from mslt.evaluate.squad_data import Answer, Question

ADJECTIVES = ("good", "fine", "great", "nice", "bad", "poor", "awful", "sad")


def questions(count: int, with_unanswerable: bool = True) -> list[Question]:
    """What was the film, or the book? Every third asks for the one that the context says nothing of."""
    made = []
    for index, (film, book) in enumerate(list(product(ADJECTIVES, ADJECTIVES))[:count]):
        asked, other = (("film", film), ("book", book))[:: 1 if index % 2 else -1]
        if with_unanswerable and index % 3 == 2:
            context, answers = f"The {other[0]} was {other[1]}.", ()
        else:
            context = f"The film was {film}. The book was {book}."
            answers = (Answer(asked[1], context.index(f"{asked[0]} was ") + len(asked[0]) + 5),)
        made.append(Question(f"q{index}", f"The {asked[0]} was?", context, answers))
    return made


def as_squad(made: Sequence[Question], version: str = "2.0") -> dict:
    """A paragraph for each question."""
    marks = [{"is_impossible": not q.answers} if version == "2.0" else {} for q in made]
    paragraphs = [
        {
            "context": q.context,
            "qas": [
                {
                    "id": q.id,
                    "question": q.text,
                    "answers": [{"text": a.text, "answer_start": a.start} for a in q.answers],
                    **mark,
                }
            ],
        }
        for q, mark in zip(made, marks, strict=True)
    ]
    return {"version": f"v{version}", "data": [{"title": "made up", "paragraphs": paragraphs}]}


def write_squad(path: Path, made: Sequence[Question], version: str = "2.0") -> Path:
    path.write_text(json.dumps(as_squad(made, version)))
    return path
