"""What papers report: figures to stand beside ours, never in their place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """One row of a table of Yang et al. 2020 (arXiv:2011.13635): percent by task, hours where they are given.
    Metrics are those of the preset `mslt`."""

    name: str
    scores: dict[str, float]
    steps: int
    hours: float | None = None


_EIGHT = ("MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE", "average")
_SEVEN = ("MNLI", "QNLI", "SST-2", "STS-B", "MRPC", "RTE", "average")


def _row(name: str, tasks: tuple[str, ...], figures: str, steps: int, hours: float | None = None) -> Reported:
    return Reported(name, dict(zip(tasks, map(float, figures.split()), strict=True)), steps, hours)


# Validation splits, medians of five runs: all after 1M steps, and after like times.
EQUAL_STEPS = (
    _row("Base, in stages", _EIGHT, "84.3 87.9 91.2 92.2 61.1 89.5 91.2 69.3 83.3", 1_000_000),
    _row("Base, full", _EIGHT, "84.4 88.0 91.5 92.7 61.2 89.7 89.7 70.2 83.4", 1_000_000),
    _row("Large, in stages", _EIGHT, "86.2 88.5 92.6 93.2 64.5 90.2 92.2 74.1 85.2", 1_000_000),
    _row("Large, full", _EIGHT, "86.5 88.9 93.0 93.6 64.0 90.4 91.7 74.5 85.3", 1_000_000),
)
EQUAL_TIME = (
    _row("Base, in stages", _SEVEN, "84.3 91.2 92.2 89.5 91.2 69.3 86.3", 1_000_000, 40),
    _row("Base, full", _SEVEN, "83.3 90.6 91.2 89.2 89.2 68.9 85.4", 480_000, 41),
    _row("Large, in stages", _SEVEN, "84.7 91.5 92.1 89.9 91.6 70.7 86.8", 500_000, 42),
    _row("Large, full", _SEVEN, "84.1 90.8 91.1 89.2 88.9 68.5 85.4", 230_000, 42),
)
TEST = (
    _row("Base, in stages", _EIGHT, "83.9 71.0 90.4 93.0 56.6 84.1 89.2 68.0 79.5", 1_000_000),
    _row("Base, full", _EIGHT, "84.2 71.4 90.7 93.5 57.2 84.4 88.8 68.1 79.8", 1_000_000),
    _row("Large, in stages", _EIGHT, "85.9 71.9 92.4 94.1 60.5 85.8 89.9 69.8 81.3", 1_000_000),
    _row("Large, full", _EIGHT, "86.4 72.1 92.8 94.7 60.6 86.1 89.1 70.2 81.5", 1_000_000),
)


@dataclass(frozen=True)
class EarlyExit:
    """A row of Table 1 of Xin et al. 2020 (arXiv:2004.12993): of the whole model the score in percent, below it what an
    exit threshold, a smaller model or fewer layers lose, and the share of time saved. Test splits by GLUE's server, one
    row at a time on a P100; F1 of MRPC and QQP. MNLI's halves share one time."""

    model: str
    method: str
    scores: dict[str, float]
    savings: dict[str, float]


_EXIT_TASKS = ("SST-2", "MRPC", "QNLI", "RTE", "QQP", "MNLI-m", "MNLI-mm")


def _exit_row(model: str, method: str, figures: str, savings: str = "") -> EarlyExit:
    scores, saved = figures.split(), savings.split()
    return EarlyExit(
        model,
        method,
        {task: float(score) for task, score in zip(_EXIT_TASKS, scores, strict=True) if score != "-"},
        {task: float(share) for task, share in zip(_EXIT_TASKS, saved, strict=bool(saved)) if share != "-"},
    )


EARLY_EXIT = (
    _exit_row("BERT-base", "whole", "93.6 88.2 91.0 69.9 71.4 83.9 83.0"),
    _exit_row("BERT-base", "DistilBERT", "-1.4 -1.1 -2.6 -9.4 -1.1 -4.5 -", "40 40 40 40 40 40 -"),
    _exit_row("BERT-base", "DeeBERT", "-0.2 -0.3 -0.1 -0.4 -0.0 -0.0 -0.1", "21 14 15 9 24 14 14"),
    _exit_row("BERT-base", "DeeBERT", "-0.6 -1.3 -0.7 -0.6 -0.1 -0.8 -0.7", "40 31 29 11 39 25 25"),
    _exit_row("BERT-base", "DeeBERT", "-2.1 -3.0 -3.1 -3.2 -2.0 -3.9 -3.8", "47 44 44 33 49 37 37"),
    _exit_row("RoBERTa-base", "whole", "94.3 90.4 92.4 67.5 71.8 87.0 86.3"),
    _exit_row("RoBERTa-base", "LayerDrop", "-1.8 - - - - -4.1 -", "50 - - - - 50 -"),
    _exit_row("RoBERTa-base", "DeeBERT", "0.1 0.1 -0.1 -0.6 0.1 -0.0 -0.0", "26 25 25 32 32 19 19"),
    _exit_row("RoBERTa-base", "DeeBERT", "-0.0 0.2 -0.5 -0.4 -0.0 -0.1 -0.3", "33 28 30 33 39 23 23"),
    _exit_row("RoBERTa-base", "DeeBERT", "-1.8 -1.1 -2.5 -1.1 -0.6 -3.9 -4.1", "44 38 39 35 44 29 29"),
)


@dataclass(frozen=True)
class ExitHistogram:
    """A panel of Figure 6 of Xin et al. 2020: SST-2, a threshold, percent of time saved, points lost."""

    model: str
    threshold: float
    saving: int
    drop: float


EXIT_HISTOGRAMS = (
    ExitHistogram("BERT-base", 0.01, 25, 0.2), ExitHistogram("BERT-base", 0.05, 34, 0.7),
    ExitHistogram("BERT-base", 0.4, 61, 5.8), ExitHistogram("RoBERTa-base", 0.3, 34, 0.1),
    ExitHistogram("RoBERTa-base", 0.55, 55, 1.3), ExitHistogram("RoBERTa-base", 0.6, 61, 3.7),
)  # fmt: skip


@dataclass(frozen=True)
class Pooling:
    """A row of Table 1 of BERTVision: percent on validation splits; accuracy, of CoLA Matthews'
    correlation, of STS-B Pearson's, of SQuAD 2.0 exact match. MSR is MRPC, on other rows than GLUE's (its test file's
    1,725). Averages are left out: the paper's differ from those of its own rows. The rows of BERT are lower than its
    code's README has them, and settings were tuned on the split that is reported."""

    name: str
    scores: dict[str, float]


_POOLED_TASKS = ("MNLI", "QNLI", "QQP", "RTE", "SST-2", "MRPC", "CoLA", "STS-B", "SQuAD")


def _pooling(name: str, figures: str) -> Pooling:
    return Pooling(name, dict(zip(_POOLED_TASKS, map(float, figures.split()), strict=True)))


POOLING = (
    _pooling("BERT-base", "82.3 90.2 89.6 63.9 92.0 82.0 53.4 87.4 69.4"),
    _pooling("AP-base", "82.2 90.3 88.6 72.6 92.7 84.0 60.0 86.2 70.1"),
    _pooling("BERT-large", "85.2 90.7 89.6 53.1 92.9 76.4 20.7 86.2 77.6"),
    _pooling("AP-large", "84.9 91.0 89.7 59.2 92.9 83.7 43.2 88.0 76.9"),
)
# Its Table 2: how many times smaller than BERT-base (for BERTVision the head alone, for which the encoder still runs),
# and percent of its scores.
COMPRESSION = (
    ("BERT-base", 1.0, 100), ("BERTVision", 209.0, 100), ("BERT-48", 62.0, 87), ("BERT-192", 5.7, 93),
    ("SqueezeBERT", 2.3, 96), ("MobileBERT", 4.3, 100), ("AdapterBERT", 0.8, 99),
)  # fmt: skip


# Its section 5.1, percent: a fine-tuned BERT and a head (AP).
POOLING_ERRORS = (
    ("task", "model", "positives predicted", "positives found", "negatives right", "correct in both"),
    ("RTE", "BERT", "67.5", "78.7", "45.0", "45.5"),
    ("RTE", "AP", "44.0", "56.8", "70.2", "45.5"),
    ("MRPC", "BERT", "69.1", "87.3", "67.0", "71.5"),
    ("MRPC", "AP", "70.7", "87.7", "63.9", "71.5"),
)


@dataclass(frozen=True)
class Surgery:
    """A row of Tables 1 and 2 of "The convexity of BERT": percent on validation splits (CoLA Matthews, MRPC and RTE
    accuracy, STS-B Pearson). Copied was layer 9 (from 0) into 10 and 11."""

    method: str
    name: str
    scores: dict[str, float]


def _surgery(method: str, name: str, figures: str) -> Surgery:
    return Surgery(method, name, dict(zip(SURGERY_TASKS, map(float, figures.split()), strict=True)))


SURGERY_TASKS = ("CoLA", "MRPC", "STS-B", "RTE")
SURGERY = {
    "Table 1: BERT-Base, uncased": (
        _surgery("plain", "fine-tuned", "58.73 85.29 87.37 72"),
        _surgery("multi-objective", "multi-objective", "59.83 83.33 89.86 70.31"),
        _surgery("extra-layer", "multi-objective + extra layer", "60.6 84.8 89.59 66.43"),
        _surgery("copy", "copying last layers", "58.8 86.76 88.33 63.18"),
    ),
    "Table 2: BERT-Base, cased": (
        _surgery("plain", "fine-tuned", "58.71 84.64 87.9 71.48"),
        _surgery("drop", "dropping last two layers", "55.27 85.05 85.84 67.15"),
    ),
}
