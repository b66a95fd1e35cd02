"""Files of probing tasks: read, refused, and made from text."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate.passages import read_passages
from mslt.evaluate.probe_make import BINS, make_rows, words_of
from mslt.evaluate.probe_tasks import SPLITS, TASKS, ProbeRows, present_tasks, read_rows

GOOD = ["tr\ta\tone", "tr\tb\ttwo words", "va\ta\tthree", "va\tb\tfour", "te\tb\tfive", "te\ta\tsix"]
SENTENCES = [
    f"The {adjective} {noun} {verb} a very {other} {thing}" + (" in the house of my old friend" * (index % 4)) + " ."
    for index, (adjective, noun, verb, other, thing) in enumerate(
        (a, n, v, o, t)
        for a in ("red", "blue", "small", "large")
        for n in ("dog", "cat", "horse", "bird")
        for v in ("saw", "made", "took", "had", "found")
        for o in ("nice", "bad", "odd")
        for t in ("table", "chair", "lamp", "cup")
    )
]


def write(folder: Path, lines: list[str], ending: str = "\n") -> Path:
    (folder / "tense.txt").write_text("\n".join(lines) + ending, encoding="utf-8", newline="")
    return folder / "tense.txt"


def test_rows_are_read_as_they_stand(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, GOOD))
    assert rows.texts == ["one", "two words", "three", "four", "five", "six"]
    assert rows.classes == ("a", "b")
    assert rows.labels.tolist() == [0, 1, 0, 1, 1, 0]
    assert {split: indices.tolist() for split, indices in rows.splits.items()} == {
        "tr": [0, 1], "va": [2, 3], "te": [4, 5],
    }  # fmt: skip
    assert rows.majority == 0.5


def test_the_commonest_label_of_training_may_be_rare_in_the_test() -> None:
    splits = {"tr": np.array([0, 1, 2]), "va": np.array([3]), "te": np.array([4, 5, 6, 7])}
    rows = ProbeRows(["x"] * 8, np.array([0, 0, 1, 0, 1, 1, 1, 0]), ("a", "b"), splits)
    assert (rows.majority, rows.majority_of_test) == (0.25, 0.75)


def test_carriage_returns_and_quotes_are_no_matter(tmp_path: Path) -> None:
    lines = [line.replace("one", '" one').replace("five", "a \u2028 b") + "\r" for line in GOOD]
    assert read_rows(write(tmp_path, lines)).texts[0] == '" one'


def test_a_part_of_the_training_rows_is_drawn(tmp_path: Path) -> None:
    lines = [f"tr\t{'ab'[index % 2]}\ttext {index}" for index in range(40)] + GOOD[2:]
    rows, again = (read_rows(write(tmp_path, lines), 10) for _ in range(2))
    assert len(rows.splits["tr"]) == 10
    assert len(rows.texts) == 14
    assert [rows.texts[index] for index in rows.splits["va"]] == ["three", "four"]
    assert rows.texts == again.texts


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([*GOOD, "te\tc\tseven"], "1 labels of split te are of no training row \\(c\\)"),
        ([*GOOD, "va\tc\tseven"], "1 labels of split va are of no training row"),
        ([line.replace("\tb\t", "\ta\t") for line in GOOD], "all training rows have the label 'a'"),
        ([*GOOD, "te\ta\t"], "line 7: the text is empty; take the line out"),
        ([*GOOD, "te\ta\t   "], "line 7: the text is empty"),
        ([*GOOD, "te\t\tseven"], "line 7: the label is empty"),
        ([*GOOD, "te\ta\tseven\teight"], "line 7: 4 cells between tabs, .*the text may hold no tab: put a space there"),
        ([*GOOD, "te\ta"], "line 7: 2 cells between tabs, not split, label and text; was it cut?"),
        ([*GOOD, ""], "line 7: 1 cells"),
        ([*GOOD, "dev\ta\tseven"], "line 7: the split is 'dev', not one of tr, va, te"),
        (GOOD[:4], "has no row of split te; it needs tr, va and te: was it cut?"),
        (GOOD[:2], "has no row of split va, te"),
    ],
)
def test_what_is_no_task_is_refused_with_its_place(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(MsltError, match=said):
        read_rows(write(tmp_path, lines))


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [*GOOD, "te\ta\tit ends in the mid"], ending="")
    with pytest.raises(MsltError, match="does not end with the end of a line: it was cut"):
        read_rows(path)
    path = write(tmp_path, [*GOOD, "te\ta\tschön"])
    path.write_bytes(path.read_bytes()[:-3])  # inside of a character
    with pytest.raises(MsltError, match="not readable as UTF-8"):
        read_rows(path)
    with pytest.raises(MsltError, match="holds no file of SentEval's probing tasks"):
        present_tasks(tmp_path)


@pytest.mark.parametrize("task", ["SentLen", "WordContent", "BigramShift"])
def test_tasks_are_made_balanced_and_apart(tmp_path: Path, task: str) -> None:
    counted = [" ".join(f"w{n}x{i}" for i in range(length)) for length in range(5, 29) for n in range(20)]
    sentences = [*SENTENCES, *counted, "Too short .", "long " * 40]
    rows = make_rows(task, sentences, 360, seed=1, num_words=4)
    assert rows == make_rows(task, sentences, 360, seed=1, num_words=4)
    assert rows != make_rows(task, sentences, 360, seed=2, num_words=4)
    texts = [text for _, _, text in rows]
    assert len(set(texts)) == len(texts), "a sentence in one row alone"
    counts = Counter((split, label) for split, label, _ in rows)
    for split in SPLITS:
        assert len({count for (of, _), count in counts.items() if of == split}) == 1, "balanced"
    (tmp_path / "t.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    assert len(read_rows(tmp_path / "t.txt").texts) == len(rows)
    if task == "SentLen":
        assert all(BINS[int(label)][0] <= len(text.split()) <= BINS[int(label)][1] for _, label, text in rows)
    if task == "WordContent":
        words = {label for _, label, _ in rows}
        assert all({word.lower() for word in text.split()} & words == {label} for _, label, text in rows)
    if task == "BigramShift":
        known = {" ".join(words_of(sentence)) for sentence in sentences}
        assert all((text in known) == (label == "O") for _, label, text in rows)
        assert all(sorted(text.split()) in [sorted(k.split()) for k in known] for _, label, text in rows[:20])


def test_any_language_has_words() -> None:
    assert words_of("Don't, she said.") == ["Don", "'", "t", ",", "she", "said", "."]
    assert words_of("我喜欢书。") == ["我", "喜", "欢", "书", "。"]
    assert words_of("Мама мыла раму!") == ["Мама", "мыла", "раму", "!"]


def test_words_keep_their_marks() -> None:
    assert words_of("मुझे हिन्दी की किताबें पसंद हैं।") == ["मुझे", "हिन्दी", "की", "किताबें", "पसंद", "हैं", "।"]
    assert words_of("cafe\u0301 می\u200cخواهم") == ["cafe\u0301", "می\u200cخواهم"]
    sentences = [f"यह मेरी किताब {index} है और वह हिन्दी में लिखी हुई है ।" for index in range(48)]
    rows = make_rows("BigramShift", sentences, 48, seed=0)
    assert len(rows) == 48
    assert len({text for _, _, text in make_rows("WordContent", HINDI, 24, seed=0, num_words=2)}) == 24


HINDI = [f"{word} यह मेरी बात {index} है ।" for index in range(24) for word in ("हिन्दी", "किताबें")]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MsltError, match="SentLen: 0 sentences of label 0 at most, of 720 with 5 to 28 words"):
        make_rows("SentLen", SENTENCES, 120, seed=0)
    with pytest.raises(MsltError, match="WordContent: 0 words stand alone in 12 sentences"):
        make_rows("WordContent", SENTENCES[:5], 120, seed=0)


def test_the_command_makes_files_from_text_and_squad(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"{s[:-2]}.\n{other[:-2]}." for s, other in
                                                zip(SENTENCES[::2], SENTENCES[1::2], strict=True)))  # fmt: skip
    (tmp_path / "b.json").write_text(
        '{"data": [{"paragraphs": [{"context": "One passage. Two\\nlines.", "qas": []}]}]}'
    )
    assert read_passages([tmp_path / "b.json"]) == ["One passage. Two lines."]
    options = ["BigramShift", "--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.json"), "--rows", "120"]
    result = CliRunner().invoke(app, ["probe", "make", *options, "--out", str(tmp_path / "out")])
    assert result.exception is None, result.output
    rows = read_rows(tmp_path / "out" / TASKS["BigramShift"].file)
    assert len(rows.texts) == 120
    assert np.bincount(rows.labels).tolist() == [60, 60]
    result = CliRunner().invoke(app, ["probe", "make", *options, "--out", str(tmp_path / "out")])
    assert "exists; give another --out" in str(result.exception)
    (tmp_path / "c.json").write_text('{"data": 3}')
    with pytest.raises(MsltError, match="is no JSON of SQuAD's"):
        read_passages([tmp_path / "c.json"])


def test_the_data_folder_holds_ten_tasks() -> None:
    if "MSLT_TEST_DATA" not in os.environ or not (Path(os.environ["MSLT_TEST_DATA"]) / "probing").is_dir():
        pytest.skip("needs MSLT_TEST_DATA with probing/ in it")
    folder = Path(os.environ["MSLT_TEST_DATA"]) / "probing"
    assert present_tasks(folder) == list(TASKS)
    for task in TASKS.values():
        rows = read_rows(folder / task.file)
        assert len(rows.texts) == (folder / task.file).read_text(encoding="utf-8").count("\n")
        assert 2 <= len(rows.classes) <= 1000
