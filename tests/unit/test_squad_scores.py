"""SQuAD's scores: against torchmetrics, against every threshold, and against cases worked by hand."""

import os
import random
from pathlib import Path

import pytest
from torchmetrics.functional.text import squad

from mslt.errors import MsltError
from mslt.evaluate.squad_data import Answer, Question, read_file
from mslt.evaluate.squad_scores import at_threshold, exact_match, f1, normalised, score, scores_of, tuned_scores
from tests.squad_files import questions

WORDS = (
    "The",
    "a",
    "an",
    "river",
    "Rivers",
    "thin",
    "1,000",
    "O'Neil",
    "–",
    "Café",
    "in",
    "IN",
    "anthem",
    "x.y",
    "!",
    "2",
)


def asked(id: str, *answers: str) -> Question:
    return Question(id, "?", "context", tuple(Answer(text, 0) for text in answers))


def noisy(generator: random.Random, words: tuple[str, ...] = WORDS) -> str:
    separators = (" ", "  ", "\t", " \u00a0")
    return "".join(word + generator.choice(separators) for word in generator.choices(words, k=generator.randint(1, 5)))


def real_dev() -> list[Question]:
    if "MSLT_TEST_DATA" not in os.environ:
        pytest.skip("MSLT_TEST_DATA names no folder with squad2/dev-v2.0-small.json")
    return read_file(Path(os.environ["MSLT_TEST_DATA"]) / "squad2" / "dev-v2.0-small.json", "2.0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick\tfox.", "quick fox"),
        ("an apple a day", "apple day"),
        ("Another theory", "another theory"),
        ("U.S.", "us"),
        ("the", ""),
        ("«Été»", "«été»"),
    ],
)
def test_normalised(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("gold", "said", "exact", "overlap"),
    [
        ("October 1973", "october, 1973", 1.0, 1.0),
        ("October 1973", "in October 1973", 0.0, 4 / 5),  # 2 of 3 and 2 of 2
        ("to be or not to be", "to be", 0.0, 1 / 2),  # 2 of 2 and 2 of 6
        ("to", "to to", 0.0, 2 / 3),
        ("cat", "dog", 0.0, 0.0),
        ("cat", "", 0.0, 0.0),
        ("", "the", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
    ],
)
def test_pairs_worked_by_hand(gold, said, exact, overlap):
    assert exact_match(gold, said) == exact
    assert f1(gold, said, "2.0") == pytest.approx(overlap)


def test_the_versions_differ_where_no_word_is_left():
    """evaluate-v1.1.py gives 0 where no word is common; evaluate-v2.0.py drops such answers."""
    assert scores_of(asked("q", "A"), "the", "1.1") == (1.0, 0.0)
    assert scores_of(asked("q", "A"), "the", "2.0") == (1.0, 1.0)
    assert scores_of(asked("q", "A", "cat"), "", "2.0") == (0.0, 0.0)


def test_the_best_answer_counts():
    assert scores_of(asked("q", "1973", "October 1973", "the month of October"), "October 1973", "2.0") == (1.0, 1.0)
    exact, overlap = scores_of(asked("q", "red green", "green blue yellow"), "green blue", "2.0")
    assert (exact, overlap) == (0.0, pytest.approx(4 / 5))


def test_against_torchmetrics():
    """1,000 noisy predictions, each with 1 to 4 answers, all answerable. Every answer keeps a word, so that
    both versions agree."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    generator = random.Random(seed)
    golds = [[f"{noisy(generator)}river" for _ in range(generator.randint(1, 4))] for _ in range(1000)]
    made = [asked(f"q{index}", *texts) for index, texts in enumerate(golds)]
    said = {q.id: generator.choice([noisy(generator), generator.choice(q.answers).text, "", "the"]) for q in made}
    expected = squad(
        [{"id": q.id, "prediction_text": said[q.id]} for q in made],
        [{"id": q.id, "answers": {"text": [a.text for a in q.answers], "answer_start": [0] * 4}} for q in made],
    )
    for version in ("1.1", "2.0"):
        found = score(made, said, version)
        assert found["exact"] == pytest.approx(expected["exact_match"].item(), abs=1e-4)  # it counts in fp32
        assert found["f1"] == pytest.approx(expected["f1"].item(), abs=1e-4)
        assert 0 < found["exact"] < found["f1"] < 100


def test_against_torchmetrics_where_no_word_is_left():
    """Answers of articles alone: torchmetrics has 2.0's rule there, with which a single one of them is `""`."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    generator = random.Random(seed)
    made = [asked(f"q{index}", noisy(generator, ("the", "a", "cat", "!"))) for index in range(1000)]
    said = {q.id: noisy(generator, ("an", "cat", "?")) for q in made}
    expected = squad(
        [{"id": q.id, "prediction_text": said[q.id]} for q in made],
        [{"id": q.id, "answers": {"text": [a.text for a in q.answers], "answer_start": [0]}} for q in made],
    )
    found = score(made, said, "2.0")
    assert found["exact"] == pytest.approx(expected["exact_match"].item(), abs=1e-4)
    assert found["f1"] == pytest.approx(expected["f1"].item(), abs=1e-4)


def test_with_and_without_an_answer_by_hand():
    made = [asked("a", "red"), asked("b", "red green"), asked("c"), asked("d"), asked("e")]
    said = {"a": "red", "b": "red", "c": "", "d": "red", "e": "the"}
    assert score(made, said, "2.0") == {
        "exact": 60.0, "f1": pytest.approx(100 * (1 + 2 / 3 + 1 + 0 + 1) / 5), "total": 5,
        "HasAns_exact": 50.0, "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 2), "HasAns_total": 2,
        "NoAns_exact": pytest.approx(200 / 3), "NoAns_f1": pytest.approx(200 / 3), "NoAns_total": 3,
    }  # fmt: skip
    assert "NoAns_total" not in score(made[:2], said, "2.0")
    assert set(score(made[:2], said, "1.1")) == {"exact", "f1", "total"}


def gold_of(question: Question) -> str:
    return question.answers[0].text if question.answers else ""


def test_gold_is_100_and_nothing_the_share_without_answer():
    made = questions(30)
    found = score(made, {q.id: gold_of(q) for q in made}, "2.0")
    assert {found[name] for name in ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")} == {100.0}
    found = score(made, dict.fromkeys((q.id for q in made), ""), "2.0")
    assert found["exact"] == found["f1"] == pytest.approx(100 / 3)


def test_gold_and_nothing_on_real_questions():
    made = real_dev()
    found = score(made, {q.id: gold_of(q) for q in made}, "2.0")
    assert (found["exact"], found["f1"], found["total"]) == (100.0, 100.0, 1378)
    found = score(made, dict.fromkeys((q.id for q in made), ""), "2.0")
    assert found["exact"] == found["f1"] == 100 * 724 / 1378
    assert (found["HasAns_f1"], found["NoAns_f1"]) == (0.0, 100.0)


# The threshold


def test_the_tuned_threshold_is_the_best_of_all():
    """Against scoring anew at every threshold that can differ, with odds of which many are equal."""
    generator = random.Random(0)
    for _ in range(50):
        made = [asked(f"q{index}", *(["red green"] if generator.random() < 0.6 else [])) for index in range(12)]
        said = {q.id: generator.choice(["red green", "red", "blue", ""]) for q in made}
        odds = {q.id: generator.randint(-3, 3) / 2 for q in made}
        tuned = tuned_scores(made, said, odds)
        for name in ("exact", "f1"):
            every = [score(made, at_threshold(said, odds, t), "2.0")[name] for t in [-9.0, *odds.values()]]
            assert tuned[f"best_{name}"] == pytest.approx(max(every))
            there = score(made, at_threshold(said, odds, tuned[f"best_{name}_thresh"]), "2.0")[name]
            assert there == pytest.approx(tuned[f"best_{name}"])


def test_where_no_answer_is_best_the_threshold_is_below_all_odds():
    made, odds = [asked("a"), asked("b", "red")], {"a": -1.0, "b": 2.0}
    tuned = tuned_scores(made, {"a": "red", "b": "blue"}, odds)
    assert tuned["best_exact"] == 50.0
    assert tuned["best_exact_thresh"] < -1.0


def test_missing_predictions_are_named():
    made = questions(4)
    with pytest.raises(MsltError, match=r"p\.json: nothing on 2 of the 4 questions \(q2, q3 …\)"):
        score(made, {"q0": "", "q1": "good"}, "2.0", "p.json")
    with pytest.raises(MsltError, match=r"odds\.json: nothing on 4 of the 4"):
        tuned_scores(made, {}, {}, "odds.json")
