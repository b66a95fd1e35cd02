"""SQuAD's scores: exact match and F1 as the official scripts count them (evaluate-v1.1.py, evaluate-v2.0.py; Rajpurkar
et al. 2016, section 6.1, and 2018, section 5)."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from mslt.errors import MsltError
from mslt.evaluate.squad_data import Question, Version

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
Pair = tuple[float, float]


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words apart by one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: str, said: str) -> float:
    return float(normalised(gold) == normalised(said))


def f1(gold: str, said: str, version: Version) -> float:
    """Of the bags of words. Where one of them is empty, 2.0 asks whether both are, 1.1 gives 0."""
    gold_words, said_words = normalised(gold).split(), normalised(said).split()
    if version == "2.0" and not (gold_words and said_words):
        return float(gold_words == said_words)
    num_common = sum((Counter(gold_words) & Counter(said_words)).values())
    return 2 * num_common / (len(gold_words) + len(said_words)) if num_common else 0.0


def scores_of(question: Question, said: str, version: Version) -> Pair:
    """(exact match, F1), 0 … 1, each the best over the answers. 2.0 leaves out answers that are all articles and
    punctuation; to a question without answers, `""` is the answer."""
    golds = [answer.text for answer in question.answers]
    if version == "2.0":
        golds = [gold for gold in golds if normalised(gold)] or [""]
    return max(exact_match(gold, said) for gold in golds), max(f1(gold, said, version) for gold in golds)


def score(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    version: Version,
    source: str = "predictions",
) -> dict[str, float]:
    """In percent, under the official script's names: `exact` and `f1` over all `total` questions, and of 2.0 the same
    over those with an answer (`HasAns_`) and without (`NoAns_`). MsltError where a question has no prediction."""
    refuse_missing(questions, predictions, source)
    pairs = [scores_of(question, predictions[question.id], version) for question in questions]
    with_answer = [pair for question, pair in zip(questions, pairs, strict=True) if question.answers]
    without = [pair for question, pair in zip(questions, pairs, strict=True) if not question.answers]
    scores = _means("", pairs)
    if version == "2.0":
        scores |= _means("HasAns_", with_answer) | _means("NoAns_", without)
    return scores


def tuned_scores(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    null_odds: Mapping[str, float],
    source: str = "null odds",
) -> dict[str, float]:
    """The best that any threshold on the odds of no answer reaches on these very questions: tuned on them, so an upper
    end, and no score to compare with another's at threshold 0.

    A question is answered where its odds are not over the threshold. As the official find_best_thresh, but questions
    with equal odds fall together, and where none is best answered the threshold lies below all odds, not at 0.
    """
    refuse_missing(questions, null_odds, source)
    pairs = [scores_of(question, answers[question.id], "2.0") for question in questions]
    best_exact, exact_threshold = _best(questions, answers, null_odds, [pair[0] for pair in pairs])
    best_f1, f1_threshold = _best(questions, answers, null_odds, [pair[1] for pair in pairs])
    return {
        "best_exact": best_exact,
        "best_exact_thresh": exact_threshold,
        "best_f1": best_f1,
        "best_f1_thresh": f1_threshold,
    }


def at_threshold(answers: Mapping[str, str], null_odds: Mapping[str, float], threshold: float) -> dict[str, str]:
    """Predictions: the answer, or `""` where the odds of no answer are over the threshold."""
    return {id: "" if null_odds[id] > threshold else text for id, text in answers.items()}


def refuse_missing(questions: Sequence[Question], said: Mapping[str, object], source: str) -> None:
    missing = [question.id for question in questions if question.id not in said]
    if missing:
        raise MsltError(
            f"{source}: nothing on {len(missing):,} of the {len(questions):,} questions ({', '.join(missing[:3])} …); "
            'every question needs an entry, with "" for no answer; or they are of another dev file'
        )


def _means(prefix: str, pairs: Sequence[Pair]) -> dict[str, float]:
    if not pairs:
        return {}
    exact, overlap = ([pair[index] for pair in pairs] for index in (0, 1))
    return {
        f"{prefix}exact": 100 * math.fsum(exact) / len(pairs),
        f"{prefix}f1": 100 * math.fsum(overlap) / len(pairs),
        f"{prefix}total": len(pairs),
    }


def _best(
    questions: Sequence[Question], answers: Mapping[str, str], null_odds: Mapping[str, float], scores: Sequence[float]
) -> Pair:
    """(percent, threshold). Answering gains the score where there is an answer; where there is none, it loses 1."""
    gains = [
        (null_odds[question.id], score if question.answers else -float(answers[question.id] != ""))
        for question, score in zip(questions, scores, strict=True)
    ]
    reached = best = float(sum(not question.answers for question in questions))
    threshold = math.nextafter(min(gains)[0], -math.inf)
    for odds, together in groupby(sorted(gains), key=itemgetter(0)):
        reached += math.fsum(gain for _, gain in together)
        if reached > best:
            best, threshold = reached, odds
    return 100 * best / len(questions), threshold
