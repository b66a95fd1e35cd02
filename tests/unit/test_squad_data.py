"""Reading SQuAD: its own files, the hub's rows, and everything that is neither."""

import copy
import json
import os
from pathlib import Path

import datasets
import pytest

from mslt.errors import MsltError
from mslt.evaluate import squad_data, squad_hub
from mslt.evaluate.squad_data import (
    Answer,
    Question,
    digest,
    drawn,
    read_by_id,
    read_file,
    refuse_lost_rows,
    with_placed_answers,
)
from tests.squad_files import as_squad, questions, write_squad


def test_read_as_written(tmp_path):
    made = [
        *questions(6),
        Question("ü", "Où ?", "L’été à Zürich 日本 🌊", (Answer("Zürich 日本", 8), Answer("🌊", 18))),
    ]
    assert read_file(write_squad(tmp_path / "dev.json", made), "2.0") == made
    answerable = [question for question in made if question.answers]
    assert read_file(write_squad(tmp_path / "dev.json", answerable, "1.1"), "1.1") == answerable


def test_real_files():
    if "MSLT_TEST_DATA" not in os.environ:
        pytest.skip("MSLT_TEST_DATA names no folder with squad2")
    folder = Path(os.environ["MSLT_TEST_DATA"]) / "squad2"
    train, dev = (read_file(folder / f"{split}-v2.0-small.json", "2.0") for split in ("train", "dev"))
    assert [len(train), len(dev), sum(not q.answers for q in dev)] == [4700, 1378, 724]
    assert with_placed_answers(train)[1] == 0
    with pytest.raises(MsltError, match=r"4,700 questions, 2,256 .* 130,319 and 86,821: .* --subset"):
        refuse_lost_rows(train, "train.json", "2.0", "train")


def broken(change) -> dict:
    parsed = as_squad(questions(3))
    change(parsed, parsed["data"][0]["paragraphs"][0], parsed["data"][0]["paragraphs"][0]["qas"][0])
    return parsed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file, paragraph, entry: file.pop("data"), r"dev\.json: has no data"),
        (lambda file, paragraph, entry: file.update(data={}), r"dev\.json: its data is \{\}, not a list"),
        (lambda file, paragraph, entry: file["data"][0].pop("paragraphs"), r"data\[0\]: has no paragraphs"),
        (lambda file, paragraph, entry: paragraph.pop("context"), r"data\[0\]\.paragraphs\[0\]: has no context"),
        (lambda file, paragraph, entry: paragraph.update(qas=[3]), r"qas\[0\]: is 3, not an object"),
        (lambda file, paragraph, entry: entry.pop("id"), r"qas\[0\]: has no id"),
        (lambda file, paragraph, entry: entry.update(id=7), r"qas\[0\]: its id is 7, not text"),
        (lambda file, paragraph, entry: entry.pop("answers"), r"qas\[0\]: has no answers"),
        (lambda file, paragraph, entry: entry["answers"][0].pop("answer_start"), r"answers\[0\]: has no answer_start"),
        (lambda file, paragraph, entry: entry["answers"][0].update(answer_start="3"), "not a whole number"),
        (
            lambda file, paragraph, entry: entry.update(is_impossible=True),
            "is_impossible is true, but it has 1 answers",
        ),
        (lambda file, paragraph, entry: entry.update(answers=[]), "is_impossible is false, but it has 0 answers"),
        (lambda file, paragraph, entry: entry.update(id="q1"), r"1 ids stand more than once \(q1 …\)"),
        (lambda file, paragraph, entry: file.update(data=[]), "holds no question"),
    ],
)
def test_damage_is_named(tmp_path, change, said):
    (tmp_path / "dev.json").write_text(json.dumps(broken(change)))
    with pytest.raises(MsltError, match=said):
        read_file(tmp_path / "dev.json", "2.0")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"id,question,context\n1,a,b\n", r"is no JSON \(line 1: .*not a table"),
        (b'{"data": [', "is no JSON"),
        (b"[]", "its JSON is a list, not an object"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
)
def test_what_is_no_squad(tmp_path, content, said):
    (tmp_path / "dev.json").write_bytes(content)
    with pytest.raises(MsltError, match=said):
        read_file(tmp_path / "dev.json", "2.0")
    with pytest.raises(MsltError, match="no such file"):
        read_file(tmp_path / "elsewhere.json", "2.0")


def test_the_other_version_is_refused(tmp_path):
    answerable = questions(6, with_unanswerable=False)
    with pytest.raises(MsltError, match=r"is SQuAD 1\.1 \(no question has is_impossible\); .* --version 1\.1"):
        read_file(write_squad(tmp_path / "one.json", answerable, "1.1"), "2.0")
    with pytest.raises(MsltError, match=r"is SQuAD 2\.0 .* --version 2\.0"):
        read_file(write_squad(tmp_path / "two.json", answerable, "2.0"), "1.1")
    with pytest.raises(MsltError, match=r"2 questions without an answer \(q2, q5 …\)"):
        read_file(write_squad(tmp_path / "one.json", questions(6), "1.1"), "1.1")


def test_rows_are_counted(monkeypatch):
    monkeypatch.setitem(squad_data.OFFICIAL, ("2.0", "dev"), (6, 4))
    refuse_lost_rows(questions(6), "dev.json", "2.0", "dev")
    for lost in (questions(5), questions(6, with_unanswerable=False)):
        with pytest.raises(MsltError, match=r"the official dev split of SQuAD 2\.0 has 6 and 4"):
            refuse_lost_rows(lost, "dev.json", "2.0", "dev")


def test_only_answers_that_stand_where_they_say_are_trained_on():
    context = "One two two three"
    made = [
        Question("right", "?", context, (Answer("two", 4),)),
        Question("second", "?", context, (Answer("two", 5), Answer("three", 12))),
        Question("wrong", "?", context, (Answer("two", 5), Answer("three", 99))),
        Question("blank", "?", context, (Answer(" ", 3),)),
        Question("none", "?", context, ()),
    ]
    placed, num_left_out = with_placed_answers(made)
    assert {q.id: q.answers for q in placed} == {
        "right": (Answer("two", 4),), "second": (Answer("three", 12),), "none": (),
    }  # fmt: skip
    assert num_left_out == 2


def test_a_small_draw_is_part_of_a_large_one():
    made = questions(40)
    small, large = drawn(made, 10, seed=3), drawn(made, 20, seed=3)
    assert large[:10] == small
    assert len({q.id for q in large}) == 20
    assert small != drawn(made, 10, seed=4)
    assert small != made[:10]
    assert {q.id for q in drawn(made, 99, seed=3)} == {q.id for q in made}


def test_one_digest_for_one_set():
    made = questions(5)
    assert digest(made) == digest(copy.deepcopy(made))
    assert digest(made) != digest(made[::-1])
    assert digest(made) != digest(questions(5, with_unanswerable=False))


@pytest.mark.parametrize(
    ("content", "said"),
    [({"a": 1}, "the value of a is not text"), ([], "is a list"), ({"b": None}, "the value of b is not text")],
)
def test_files_of_predictions(tmp_path, content, said):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(MsltError, match=said):
        read_by_id(tmp_path / "p.json", (str,), "text")


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_odds_that_are_no_number(tmp_path, value):
    (tmp_path / "odds.json").write_text(f'{{"a": 0.5, "b": {value}}}')
    with pytest.raises(MsltError, match="the value of b is not a number"):
        read_by_id(tmp_path / "odds.json", (int, float), "a number")


# The hub


def rows_of(made: list[Question]) -> datasets.Dataset:
    """As rajpurkar/squad_v2 has them."""
    return datasets.Dataset.from_list(
        [
            {
                "id": q.id,
                "title": "made up",
                "context": q.context,
                "question": q.text,
                "answers": {"text": [a.text for a in q.answers], "answer_start": [a.start for a in q.answers]},
            }
            for q in made
        ]
    )


def test_the_hub_gives_the_same_questions(monkeypatch):
    asked_for = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked_for.append((name, split)) or rows_of(questions(6))
    )
    assert squad_hub.read_hub("2.0", "dev") == questions(6)
    with pytest.raises(MsltError, match=r"rajpurkar/squad \(train\): 2 questions without an answer"):
        squad_hub.read_hub("1.1", "train")
    assert asked_for == [("rajpurkar/squad_v2", "validation"), ("rajpurkar/squad", "train")]


def test_no_hub_says_how_to_go_on(monkeypatch):
    def unreachable(name, split):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(MsltError, match=r"squad_v2: cannot be read from the hub \(Couldn't reach the Hub\).*--train"):
        squad_hub.read_hub("2.0", "dev")
