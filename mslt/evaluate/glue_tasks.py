"""The tasks of GLUE (Wang et al. 2019, arXiv:1804.07461, table 1) and how papers fine-tuned on them: plain data.

Row counts are those of GLUE's own files, and of `nyu-mll/glue` on the hub. Labels are in the order of the hub's
numbers.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True)
class Task:
    """`columns` holds the names of one or two sentences in GLUE's tsv files, `hub_columns` those on the hub;
    `label_column` is of the tsv files. Without `labels` it is a regression; where it `submits_labels`, GLUE's server
    wants their names. `validation` and `test` name the splits of each, `rows` counts them in the order train,
    validation, test. `folder` and `files` (where a split's differs from its name) are GLUE's own, `zip_names` those of
    a submission."""

    name: str
    folder: str
    hub_config: str
    columns: tuple[str, ...]
    hub_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    rows: tuple[int, ...]
    submits_labels: bool = False
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    zip_names: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=lambda: {"validation": "dev"})

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", *self.validation, *self.test)


PAIR = ("sentence1", "sentence2")
BINARY = ("0", "1")
ENTAILS = ("entailment", "not_entailment")
MNLI_LABELS = ("entailment", "neutral", "contradiction")

TASKS = {
    task.name: task
    for task in (
        Task("CoLA", "CoLA", "cola", ("sentence",), ("sentence",), "label", BINARY, (8551, 1043, 1063)),
        Task("SST-2", "SST-2", "sst2", ("sentence",), ("sentence",), "label", BINARY, (67349, 872, 1821)),
        Task("MRPC", "MRPC", "mrpc", ("#1 String", "#2 String"), PAIR, "Quality", BINARY, (3668, 408, 1725)),
        Task("STS-B", "STS-B", "stsb", PAIR, PAIR, "score", (), (5749, 1500, 1379)),
        Task(
            "QQP", "QQP", "qqp", ("question1", "question2"), ("question1", "question2"), "is_duplicate", BINARY,
            (363846, 40430, 390965),
        ),
        Task(
            "MNLI", "MNLI", "mnli", PAIR, ("premise", "hypothesis"), "gold_label", MNLI_LABELS,
            (392702, 9815, 9832, 9796, 9847), submits_labels=True,
            validation=("validation_matched", "validation_mismatched"), test=("test_matched", "test_mismatched"),
            zip_names=("MNLI-m", "MNLI-mm"),
            files={"validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched"},
        ),
        Task(
            "QNLI", "QNLI", "qnli", ("question", "sentence"), ("question", "sentence"), "label", ENTAILS,
            (104743, 5463, 5463), submits_labels=True,
        ),
        Task("RTE", "RTE", "rte", PAIR, PAIR, "label", ENTAILS, (2490, 277, 3000), submits_labels=True),
        Task("WNLI", "WNLI", "wnli", PAIR, PAIR, "label", BINARY, (635, 71, 146)),
    )
}  # fmt: skip
# GLUE's diagnostic sentences: a test split alone, answered by the model of MNLI.
DIAGNOSTIC = Task(
    "AX", "diagnostic", "ax", PAIR, ("premise", "hypothesis"), "", MNLI_LABELS, (0, 1104),
    submits_labels=True, validation=(), files={"test": "diagnostic"},
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """How one paper fine-tuned: a grid of rates and batches, run with several seeds.

    Of a setting counts the median over seeds of the task's headline metric, of a task the best setting. With
    `best_epoch` the epoch with the best headline counts in each run, else the last. `epochs`, `rates`, `batches` and
    `tokens` hold what differs from the default for some tasks, `headlines` the metric of those that are not judged by
    accuracy (of MNLI it is the mean of matched and mismatched)."""

    source: str
    tasks: tuple[str, ...]
    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...] = (32,)
    num_epochs: int = 3
    num_seeds: int = 1
    max_tokens: int = 128
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    best_epoch: bool = False
    epochs: dict[str, int] = field(default_factory=dict)
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    batches: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    headlines: dict[str, Metric] = field(default_factory=dict)

    def headline(self, task: str) -> Metric:
        return self.headlines.get(task, "accuracy")


EIGHT = ("MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE")
_DEEBERT = Preset(
    source="Xin et al. 2020 (arXiv:2004.12993), and the scripts beside its code",
    tasks=("SST-2", "MRPC", "QNLI", "RTE", "QQP", "MNLI"),
    learning_rates=(2e-5,),
    batch_sizes=(8,),
    warmup_share=0.0,
    weight_decay=0.0,
    headlines={"MRPC": "f1", "QQP": "f1"},
)
PRESETS = {
    "mslt": Preset(
        source="Yang et al. 2020 (arXiv:2011.13635), section 4.1; what it leaves open as in Devlin et al. 2019",
        tasks=EIGHT,
        learning_rates=(5e-5, 4e-5, 3e-5, 2e-5),
        num_seeds=5,
        epochs={"STS-B": 10, "RTE": 10},
        headlines={"MRPC": "f1", "QQP": "f1", "CoLA": "matthews", "STS-B": "spearman"},
    ),
    "deebert": _DEEBERT,
    "deebert-roberta": replace(_DEEBERT, source=f"{_DEEBERT.source}, for RoBERTa", num_epochs=10),
    "bertvision": Preset(
        source="BERTVision, its backbone's fine-tuning",
        tasks=EIGHT,
        learning_rates=(2e-5,),
        num_epochs=1,
        rates={"MNLI": (1e-5,), "QNLI": (1e-5,), "QQP": (1e-5,)},
        batches={"RTE": (16,), "CoLA": (16,), "STS-B": (16,)},
        tokens={"RTE": 250},
        headlines={"CoLA": "matthews", "STS-B": "pearson"},
    ),
    "convexity": Preset(
        source="The convexity of BERT, its fine-tuned models; three repetitions, the best epoch of five",
        tasks=(*EIGHT, "WNLI"),
        learning_rates=(5e-5, 3e-5, 2e-5),
        batch_sizes=(16, 32),
        num_epochs=5,
        num_seeds=3,
        best_epoch=True,
        headlines={"CoLA": "matthews", "STS-B": "pearson"},
    ),
    "quick": Preset(
        source="ours: one run of each task",
        tasks=EIGHT,
        learning_rates=(5e-5,),
        epochs={"MNLI": 1, "QQP": 1, "QNLI": 1, "SST-2": 1},
        headlines={"MRPC": "f1", "QQP": "f1", "CoLA": "matthews", "STS-B": "spearman"},
    ),
}
