"""`mslt evaluate squad`: windows against Hugging Face's own, spans against a plain loop, small checkpoints."""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from data_prep.vocabulary import SPECIALS, build_tokenizer
from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate import squad
from mslt.evaluate.fine_tune import FineTuning
from mslt.evaluate.positions import refuse_over_positions, untrained_positions
from mslt.evaluate.squad import Shape, windows_of
from mslt.evaluate.squad_data import Answer, Question
from mslt.plan import Plan
from mslt.rundir import find_model
from tests.encoders import write_encoder
from tests.squad_files import questions, write_squad

NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
TEXT = "a river runs through the old town of Zürich where café owners naïvely sell ice cream in 1973 and 2,000 people"


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    """Whole words of TEXT, and single characters for all others; `[CLS] A [SEP] B [SEP]`."""
    words = dict.fromkeys(TEXT.lower().replace("ü", "u").replace("é", "e").replace("ï", "i").split())
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.?"
    tokens = dict.fromkeys([*SPECIALS, *letters, *(f"##{letter}" for letter in letters), *words])
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(list(tokens), lowercase=True), **NAMES)


@pytest.fixture(scope="module")
def byte_pairs() -> PreTrainedTokenizerFast:
    """As RoBERTa's: `<s> A </s></s> B </s>`, spaces inside tokens."""
    learner = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator([TEXT] * 4, vocab_size=320, special_tokens=special, show_progress=False)
    learner._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, **names)


# Windows


@pytest.mark.parametrize("name", ["wordpiece", "byte_pairs"])
def test_windows_are_hugging_faces(name, request):
    """Its tokenizers cut a pair themselves, where `stride` is the overlap of two windows: the room without ours."""
    tokenizer = request.getfixturevalue(name)
    generator = random.Random(0)
    shape = Shape(sequence_length=40, stride=7, question_tokens=64)
    for num_words in (1, 3, 10, 60, 200):
        asked = Question("q", "Where is Zürich?", " ".join(generator.choices(TEXT.split(), k=num_words)), ())
        num_asked = len(tokenizer(asked.text, add_special_tokens=False)["input_ids"])
        room = 40 - num_asked - tokenizer.num_special_tokens_to_add(pair=True)
        made = windows_of([asked], tokenizer, replace(shape, question_tokens=num_asked))
        expected = tokenizer(
            asked.text, asked.context, truncation="only_second", max_length=40, stride=room - 7,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
        )  # fmt: skip
        assert [window.ids.tolist() for window in made] == expected["input_ids"]
        assert [window.types.tolist() for window in made] == expected["token_type_ids"]
        for index, window in enumerate(made):
            inside = [which == 1 for which in expected.sequence_ids(index)]
            offsets = [pair for pair, is_in in zip(expected["offset_mapping"][index], inside, strict=True) if is_in]
            for (low, high), theirs in zip(window.offsets.tolist(), offsets, strict=True):
                assert asked.context[low:high] == asked.context[slice(*theirs)].strip()  # theirs may keep a space
                assert abs(high - theirs[1]) <= (low == high)
            assert not offsets or window.at == inside.index(True)
        assert num_words < 60 or len(made) > 3


CHARACTERS = st.sampled_from(
    [*"abctz 19,.", "é", "e\u0301", "ß", "日", "本", "🌊", "👩‍🚀", "\u00a0", "\u200b", "\n", "İ", "ﬁ"]
)
WORD = st.sampled_from(TEXT.split())


@st.composite
def asked_questions(draw) -> Question:
    """A context of words and any characters, and an answer that is any piece of it."""
    parts = draw(st.lists(st.one_of(WORD, st.lists(CHARACTERS, max_size=6).map("".join)), min_size=1, max_size=60))
    context = " ".join(parts)
    start = draw(st.integers(0, len(context)))
    text = context[start : start + draw(st.integers(0, 40))]
    return Question(
        "q", "".join(draw(st.lists(CHARACTERS, max_size=30))), context, (Answer(text, start),) if text.strip() else ()
    )


@pytest.mark.parametrize("name", ["wordpiece", "byte_pairs"])
@settings(max_examples=150, deadline=None)
@given(asked=asked_questions(), stride=st.integers(1, 12), kept=st.integers(1, 12))
def test_every_answer_is_found_again_or_there_is_none(name, request, asked, stride, kept):
    tokenizer = request.getfixturevalue(name)
    made = windows_of([asked], tokenizer, Shape(40, stride, kept))
    whole = squad.tokenized([asked.context], tokenizer)[0]
    first, last = squad.answer_tokens(asked, whole)
    seen = np.zeros(len(whole.ids), int)
    most = np.zeros(len(whole.ids), int)
    for number, window in enumerate(made):
        begin = number * stride
        piece = whole.ids[begin : begin + len(window.offsets)]
        seen[begin : begin + len(piece)] += 1
        most[begin : begin + len(piece)] += window.has_most_context
        assert len(window.ids) == len(window.types) <= 40
        assert window.ids[window.at : window.at + len(piece)].tolist() == piece.tolist()
        assert window.ids[0] == tokenizer.cls_token_id
        holds_all = first >= 0 and begin <= first and last < begin + len(piece)
        assert (window.start > 0) == (window.end > 0) == holds_all
        if holds_all:
            low, high = (window.offsets[place - window.at] for place in (window.start, window.end))
            found, answer = asked.context[low[0] : high[1]], asked.answers[0]
            assert low[0] < answer.start + len(answer.text)
            assert high[1] > answer.start
            if answer.text == answer.text.strip() and answer.text.isascii():  # no character that a tokenizer drops
                assert answer.text in found
            is_word = asked.context[: answer.start].endswith((" ", "")) and answer.text in TEXT.split()
            around = (
                asked.context[answer.start - 1 : answer.start] + asked.context[answer.start + len(answer.text) :][:1]
            )
            if is_word and not around.strip(" "):
                assert found.strip() == answer.text
    assert (seen > 0).all()
    assert (most == 1).all()
    room = 40 - len(made[0].ids) + len(made[0].offsets)
    if first >= 0 and last - first < room - stride:  # no longer than two windows share
        assert any(window.start for window in made)


def test_characters_are_counted_in_the_text_as_it_stands(wordpiece):
    """Lower-casing and taking accents off change how long a text is; the offsets do not."""
    context = "İstanbul 👩‍🚀 cafe\u0301 日本 Zürich, 1973"
    for text in ("İstanbul", "日", "Zürich", "1973"):
        asked = Question("q", "?", context, (Answer(text, context.index(text)),))
        (window,) = windows_of([asked], wordpiece, Shape(60, 8, 8))
        low, high = (window.offsets[place - window.at] for place in (window.start, window.end))
        assert context[low[0] : high[1]].startswith(text)


def test_most_context_as_in_devlins_loop():
    """run_squad.py: min(left, right) + 0.01 * length, the first of equals."""
    for num_tokens, room, stride in ((1, 5, 2), (5, 5, 2), (23, 7, 3), (40, 10, 9), (41, 12, 1)):
        starts = squad.window_starts(num_tokens, room, stride)
        spans = [(start, min(room, num_tokens - start)) for start in starts]
        expected = []
        for token in range(num_tokens):
            best, best_index = None, None
            for index, (start, length) in enumerate(spans):
                if start <= token < start + length:
                    value = min(token - start, start + length - 1 - token) + 0.01 * length
                    if best is None or value > best:
                        best, best_index = value, index
            expected.append(best_index)
        assert squad.most_context(num_tokens, starts, room).tolist() == expected


def test_an_answer_that_no_window_holds_whole_is_no_answer(wordpiece):
    context = " ".join(["river"] * 100)
    asked = Question("q", "?", context, (Answer(context[:300], 0),))
    assert {(window.start, window.end) for window in windows_of([asked], wordpiece, Shape(40, 8, 8))} == {(0, 0)}


# Spans


def in_devlins_way(question: Question, windows: list, logits: list) -> tuple[str, float]:
    """write_predictions of run_squad.py as plain loops: (best text, null score less its score)."""
    found, null = [], math.inf
    for window, (start, end) in zip(windows, logits, strict=True):
        null = min(null, float(start[0] + end[0]))
        inside = range(window.at, window.at + len(window.offsets))
        best_starts = sorted(inside, key=lambda place: -start[place])[:20]
        best_ends = sorted(inside, key=lambda place: -end[place])[:20]
        for low in best_starts:
            for high in best_ends:
                if not window.has_most_context[low - window.at] or high < low or high - low + 1 > 30:
                    continue
                text = question.context[window.offsets[low - window.at][0] : window.offsets[high - window.at][1]]
                found.append((float(start[low]) + float(end[high]), text))
    score, text = max(found, key=lambda pair: pair[0]) if found else (0.0, "")
    return text, null - score


def test_the_best_span_is_devlins(wordpiece):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(TEXT.split(), size)) for size in (1, 30, 90, 90, 200)]
    made = [Question(f"q{index}", "where is the river", text, ()) for index, text in enumerate(texts)]
    windows = windows_of(made, wordpiece, Shape(60, 13, 8))
    logits = [tuple(generator.normal(size=(2, len(window.ids))).astype(np.float32)) for window in windows]
    found = squad.decide(made, windows, logits)
    for index, question in enumerate(made):
        mine = [number for number, window in enumerate(windows) if window.question_index == index]
        text, odds = in_devlins_way(question, [windows[n] for n in mine], [logits[n] for n in mine])
        assert found.answers[question.id] == text
        assert found.null_odds[question.id] == pytest.approx(odds, abs=1e-5)
    assert len(windows) > 10


def test_only_the_context_answers(wordpiece):
    """The question's tokens and the special ones have the best logits, an end stands before its start, a span is too
    long: none of it is taken."""
    asked = Question("q", "where is the river", " ".join(["town"] * 33 + ["cream"]), ())
    (window,) = windows_of([asked], wordpiece, Shape(60, 13, 8))
    start, end = np.full((2, len(window.ids)), -9.0, np.float32)
    start[: window.at], end[: window.at] = 50.0, 50.0
    start[-1], end[-1] = 50.0, 50.0
    start[window.at + 2], end[window.at + 33], end[window.at + 1] = 5.0, 4.0, 4.0  # 32 tokens; backwards
    end[window.at + 31] = 1.0  # 30 tokens
    assert squad.spans_of(window, start, end)[0][0] == 6.0
    found = squad.decide([asked], [window], [(start, end)])
    assert found.answers["q"] == " ".join(["town"] * 30)
    assert found.null_odds["q"] == 100.0 - 6.0


def test_no_answer_is_the_least_of_all_windows(wordpiece):
    asked = Question("q", "where", " ".join(["town"] * 80), ())
    windows = windows_of([asked], wordpiece, Shape(40, 13, 8))
    logits = [tuple(np.zeros((2, len(window.ids)), np.float32)) for window in windows]
    for number, (start, _) in enumerate(logits):
        start[0] = (7.0, -3.0, 2.0)[number % 3]
    assert squad.decide([asked], windows, logits).null_odds["q"] == -3.0


def test_an_empty_context_has_no_answer(wordpiece):
    made = [Question("q", "where", "", ()), Question("p", "where", " \u200b", ())]
    windows = windows_of(made, wordpiece, Shape(40, 13, 8))
    logits = [tuple(np.ones((2, len(window.ids)), np.float32)) for window in windows]
    assert squad.decide(made, windows, logits).answers == {"q": "", "p": ""}


# Checkpoints

SMALL = ("--sequence-length", "24", "--stride", "6", "--question-tokens", "6")
LEARNS = ("--learning-rate", "4e-3", "--batch-size", "8", "--epochs", "120")


def run(*arguments: Any):
    return CliRunner().invoke(app, ["evaluate", "squad", *map(str, arguments)])


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, MsltError), (result.exception, result.output)
    return str(result.exception)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    return write_squad(tmp_path_factory.mktemp("data") / "eight.json", questions(8))


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_eight_questions_are_learnt_by_heart(kind, eight, tmp_path):
    encoder = write_encoder(tmp_path / kind, kind)
    made = questions(8)
    model = AutoModelForQuestionAnswering.from_pretrained(encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    told: list[tuple[str, int, int]] = []
    tuning = FineTuning(learning_rate=4e-3, batch_size=8, num_epochs=120, seed=0)
    found, prediction = squad.evaluate(
        model, tokenizer, made, made, "2.0", Shape(24, 6, 6), tuning, lambda *said: told.append(said)
    )
    assert found["scores"]["f1"] == 100.0, prediction
    assert found["tuned_on_dev"]["best_f1"] >= found["scores"]["f1"]
    assert found["all_empty"] == 25.0
    assert found["windows"] == {"train": 8, "dev": 8}
    assert told[0] == ("cutting windows", 0, 1)
    assert told[1] == ("training", 1, 120)
    assert told[120] == ("training", 120, 120)
    assert told[121:] == [("predicting", 1, 1)]


def test_the_command_learns_writes_and_scores(bert, eight, tmp_path):
    arguments = (bert, "--train", eight, "--dev", eight, "--subset", *SMALL, *LEARNS, "--save-model")
    result = run(*arguments, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, (result.exception, result.output)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["scores"]["f1"] == 100.0
    assert written["questions"] == {"train": 8, "trained_on": 8, "left_out": 0, "dev": 8}
    assert written["warnings"] == ["8 questions of dev are trained on: the scores say nothing of new ones"]
    assert written["settings"]["learning_rate"] == 4e-3
    assert written["provenance"]["mslt"]
    assert json.loads(result.stdout) == written

    out = tmp_path / "out"
    predictions, odds = (json.loads((out / f"{name}.json").read_text()) for name in ("predictions", "null_odds"))
    answers = json.loads((out / "answers.json").read_text())
    assert predictions == {id: "" if odds[id] > 0 else answers[id] for id in odds}
    scored = run("--score", out / "predictions.json", "--dev", eight, "--subset", "--json")
    assert json.loads(scored.stdout)["scores"] == written["scores"]
    tuned = run(
        "--score", out / "answers.json", "--null-odds", out / "null_odds.json", "--dev", eight, "--subset", "--json"
    )
    assert json.loads(tuned.stdout)["tuned_on_dev"] == written["tuned_on_dev"]
    assert "saying no answer always" in run("--score", out / "predictions.json", "--dev", eight, "--subset").stdout

    origin = json.loads((out / "model" / "provenance.json").read_text())
    assert (origin["task"], origin["settings"]) == ("SQuAD", written["settings"])
    model = AutoModelForQuestionAnswering.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    windows = windows_of(questions(8), tokenizer, Shape(24, 6, 6))
    said = squad.ask(model, tokenizer, windows, FineTuning(4e-3, 8, 120, 0))
    assert squad.decide(questions(8), windows, said).answers == answers

    # A finished result is not run again; another's is refused.
    before = (out / "result.json").stat().st_mtime_ns
    again = run(*arguments, "--out", out)
    assert again.exit_code == 0
    assert "finished before" in again.stderr
    assert "with an answer" in again.stdout
    assert (out / "result.json").stat().st_mtime_ns == before
    assert "seed 0, now 1" in refused(*arguments, "--out", out, "--seed", "1")
    other = write_encoder(tmp_path / "other", seed=1)
    assert "weights" in refused(other, *arguments[1:], "--out", out)
    (out / "result.json").write_text("{}")
    assert "is no result of mslt's" in refused(*arguments, "--out", out)


def test_1_1_and_the_defaults(bert, tmp_path):
    copied = shutil.copytree(bert, tmp_path / "bert")
    data = write_squad(tmp_path / "one.json", questions(8, with_unanswerable=False), "1.1")
    result = run(f"{copied}/", "--train", data, "--dev", data, "--subset", "--version", "1.1", *SMALL)
    assert result.exit_code == 0, (result.exception, result.output)
    out = tmp_path / "bert-evaluation" / "squad1"
    written = json.loads((out / "result.json").read_text())
    assert [written["settings"][name] for name in ("learning_rate", "batch_size", "epochs")] == [5e-5, 32, 3]
    assert set(written["scores"]) == {"exact", "f1", "total"}
    assert all(json.loads((out / "predictions.json").read_text()).values())
    assert sorted(path.name for path in out.iterdir()) == ["predictions.json", "result.json"]


def test_devlins_settings_of_2_0():
    assert squad.DEVLINS["2.0"] == (5e-5, 48, 2)


def test_twice_is_the_same_and_a_seed_draws_its_questions(bert, tmp_path):
    data = write_squad(tmp_path / "data.json", questions(30))
    arguments = (bert, "--train", data, "--dev", data, "--subset", *SMALL, "--max-train-questions", 12)
    for name in ("one", "two"):
        assert run(*arguments, "--out", tmp_path / name).exit_code == 0
    one, two = (json.loads((tmp_path / name / "null_odds.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert json.loads((tmp_path / "one" / "result.json").read_text())["questions"]["trained_on"] == 12
    assert run(*arguments, "--out", tmp_path / "three", "--seed", 1).exit_code == 0
    assert one != json.loads((tmp_path / "three" / "null_odds.json").read_text())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(bert, eight, tmp_path, precision):
    result = run(bert, "--train", eight, "--dev", eight, "--subset", *SMALL, "--precision", precision,
                 "--out", tmp_path / "out", "--epochs", "1")  # fmt: skip
    assert result.exit_code == 0, (result.exception, result.output)


def test_a_divergence_is_said(bert, wordpiece):
    model = AutoModelForQuestionAnswering.from_pretrained(bert)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        model.qa_outputs.bias.fill_(math.nan)
    windows = windows_of(questions(8), tokenizer, Shape(24, 6, 6))
    with pytest.raises(MsltError, match=r"not finite \(--learning-rate 0.5"):
        squad.ask(model, tokenizer, windows, FineTuning(0.5, 8, 1, 0))


# Bad input


def test_options_that_do_not_go_together(bert, eight, tmp_path):
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps({question.id: "" for question in questions(7)}))
    assert "no checkpoint" in refused("--train", eight)
    assert "give both, or neither" in refused(bert, "--train", eight)
    assert "belongs to --score" in refused(bert, "--null-odds", eight)
    assert "scores predictions alone" in refused(bert, "--score", predictions)
    assert "nothing on 1 of the 8 questions (q7 …)" in refused("--score", predictions, "--dev", eight, "--subset")
    one = write_squad(tmp_path / "one.json", questions(8, with_unanswerable=False), "1.1")
    said = refused("--score", predictions, "--null-odds", predictions, "--dev", one, "--version", "1.1", "--subset")
    assert "every question has an answer" in said
    assert "the official dev split of SQuAD 2.0 has 11,873" in refused("--score", predictions, "--dev", eight)
    seven = write_squad(tmp_path / "seven.json", questions(5))
    result = run("--score", predictions, "--dev", seven, "--subset")
    assert result.exit_code == 0
    assert "2 of its 7 ids are not in the dev file" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sequence-length", "64"), "--sequence-length 64: .* has 40 positions; give 40 or less"),
        (("--stride", "12"), "--stride 12: .* has room for 15 tokens|x"),
        (("--stride", "15"), r"--stride 15: .* room for 15 tokens of the context \(beside 6 of the question and 3"),
        (("--learning-rate", "0"), "--learning-rate 0.0: must be above 0"),
        (("--device", "cuda:77"), "--device cuda:77: cannot be used here"),
        (("--device", "toaster"), "--device toaster: cannot be used here"),
        (("--tokenizer", "/nowhere"), "/nowhere: no tokenizer"),
        (("--version", "1.1"), "is SQuAD 2.0"),
    ],
)
def test_bad_settings(bert, eight, tmp_path, options, said):
    arguments = (bert, "--train", eight, "--dev", eight, "--subset", "--out", tmp_path / "out", *SMALL, *options)
    if said.endswith("|x"):  # the widest stride that still overlaps
        assert run(*arguments, "--epochs", "1").exit_code == 0
        return
    message = refused(*arguments)
    assert re.search(said, message), message
    assert not (tmp_path / "out").exists()


def test_bad_data(bert, eight, tmp_path):
    def on(train: Path, dev: Path = eight) -> str:
        return refused(bert, "--train", train, "--dev", dev, "--subset", "--out", tmp_path / "out", *SMALL)

    (tmp_path / "data.csv").write_text("id,question\n1,2\n")
    assert "is no JSON" in on(tmp_path / "data.csv")
    assert "no such file" in on(tmp_path / "gone.json")
    wrong = [replace(q, answers=tuple(Answer(a.text, a.start + 1) for a in q.answers)) for q in questions(8)]
    answerable = [question for question in wrong if question.answers]
    shifted = write_squad(tmp_path / "shifted.json", answerable)
    assert "no answer stands where its answer_start says" in on(shifted)
    assert not (tmp_path / "out").exists()
    some = write_squad(tmp_path / "some.json", wrong)
    result = run(bert, "--train", some, "--dev", eight, "--subset", "--out", tmp_path / "out", *SMALL, "--epochs", "1")
    assert result.exit_code == 0, result.exception
    assert "warning: 6 questions have no answer that stands where its answer_start says" in result.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["questions"]["left_out"] == 6


class Slow:
    is_fast = False


def test_tokenizers_that_cannot_be_used(wordpiece):
    with pytest.raises(MsltError, match="Slow: a slow tokenizer, which does not tell where"):
        squad.frame_of(Slow())  # type: ignore[arg-type]
    backwards = PreTrainedTokenizerFast(
        tokenizer_object=wordpiece.backend_tokenizer, **{**NAMES, "cls_token": "[MASK]"}
    )
    with pytest.raises(MsltError, match=r"does not begin a pair with its \[CLS\]"):
        squad.frame_of(backwards)


# Positions


def test_robertas_kind_has_fewer_positions(tmp_path):
    """Of 40, the entry of padding and those before it are no positions: with padding 0, 39 are left."""
    model = AutoModelForQuestionAnswering.from_pretrained(write_encoder(tmp_path / "roberta", "roberta"))
    refuse_over_positions(model.config, "roberta", 39, "--sequence-length")
    model(input_ids=torch.full((1, 39), 5))
    with pytest.raises(MsltError, match="has 39 positions"):
        refuse_over_positions(model.config, "roberta", 40, "--sequence-length")
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 40), 5))


def test_positions_that_were_never_trained(tiny_plan: Plan, tmp_path):
    """Of a run whose stages had 16, 32 and 24 tokens, each stage's model knows what came before it."""
    lengths = (16, 32, 24)
    stages = tuple(
        stage.model_copy(update={"sequence_length": length})
        for stage, length in zip(tiny_plan.stages, lengths, strict=True)
    )
    run_dir = tmp_path / "run"
    for number in (1, 2, 3):
        (run_dir / f"stage-{number}" / "model").mkdir(parents=True)
    (run_dir / "plan.json").write_text(tiny_plan.model_copy(update={"stages": stages}).model_dump_json())
    first, second, third = (str(run_dir / f"stage-{number}" / "model") for number in (1, 2, 3))

    def untrained(path: str, num_tokens: int) -> str | None:
        folder, origin = find_model(Path(path))
        return untrained_positions(str(folder), origin, num_tokens)

    assert untrained(first, 16) is None
    assert "positions 16 … 31 were never trained" in str(untrained(first, 32))
    assert untrained(second, 32) is None
    assert untrained(third, 32) is None
    assert "positions 32 … 39 were never trained" in str(untrained(f"{third}/", 40))
    assert untrained(str(tmp_path), 40) is None
    (run_dir / "plan.json").write_text("{}")
    assert "is not known" in str(untrained(first, 16))


def test_the_command_warns_of_untrained_positions(tiny_plan: Plan, bert, eight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(bert, run_dir / "stage-1" / "model")
    stages = tuple(stage.model_copy(update={"sequence_length": 16}) for stage in tiny_plan.stages)
    (run_dir / "plan.json").write_text(tiny_plan.model_copy(update={"stages": stages}).model_dump_json())
    result = run(run_dir / "stage-1" / "model", "--train", eight, "--dev", eight, "--subset", *SMALL, "--epochs", "1")
    assert result.exit_code == 0, result.exception
    assert "positions 16 … 23 were never trained" in result.stderr
    out = run_dir / "stage-1" / "model-evaluation" / "squad2" / "result.json"
    assert "positions 16 … 23 were never trained" in json.loads(out.read_text())["warnings"][-1]
