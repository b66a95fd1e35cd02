"""Every table and figure of the four papers: the commands that make it, what the paper has, and what we have.

Hours are of one V100 in fp32 and rough, and follow from the commands: of pretraining the paper's own, of fine-tuning
floating-point operations at the share of its peak that mslt.hardware names. Nothing of ours stands here without a
record.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mslt.config import ModelConfig
from mslt.cost import operations
from mslt.evaluate.glue_tasks import PRESETS, TASKS
from mslt.hardware import FP32_EFFICIENCY, GPUS
from mslt.report import paper

RECORDS = "benchmarks/records"
PAPERS = {
    "mslt": "Yang et al. 2020, Progressively Stacking 2.0 (arXiv:2011.13635)",
    "deebert": "Xin et al. 2020, DeeBERT (arXiv:2004.12993)",
    "bv": "BERTVision (github.com/cbenge509/BERTVision)",
    "conv": "The convexity of BERT",
}


@dataclass(frozen=True)
class Ours:
    """What was measured here, in words, and the record that says so: a file name below RECORDS."""

    found: str
    record: str


@dataclass(frozen=True)
class Reproduction:
    """`name` begins with its paper's. `commands` make it, in order, at the paper's size; `reported` are the paper's
    figures, a header and rows, none for a picture; `note` is what has to be known beside them. `ours` was measured at
    another size."""

    name: str
    what: str
    commands: tuple[str, ...]
    reported: tuple[tuple[str, ...], ...] = ()
    note: str = ""
    ours: Ours | None = None

    @property
    def gpu_hours(self) -> float:
        return sum(map(hours_of, self.commands))


def _bert(num_layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=num_layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
        vocab_size=30522,
    )  # fmt: skip


BASE, LARGE = _bert(12, 768), _bert(24, 1024)
NUM_GPUS = 32  # V100s, in Yang et al.
# Of them, by recipe. Their Table 3 has hours of parts of the runs: 480,000 and 230,000 of 1M steps in full, half of
# those of Large in stages.
PRETRAINING_H = {
    "bert-base": 40.0, "bert-base-full": 41 / 0.48, "bert-large": 42 / 0.5, "bert-large-full": 42 / 0.23,
    "base-480k.yaml": 41.0, "large-500k.yaml": 42.0, "large-230k.yaml": 42.0,
}  # fmt: skip
SQUAD_ROWS, SQUAD_TOKENS = 130_319, 384
PROBE_ROWS, PROBE_TOKENS = 10 * 120_000, 32  # SentEval's ten tasks
MLM_PROBE_ROWS = 18_896  # paragraphs of SQuAD 1.1


def pass_hours(model: ModelConfig, num_rows: int, num_tokens: int = 128, passes: int = 3) -> float:
    """Hours of a V100 for so many passes through the layers, a forward pass counting one, a backward pass two."""
    flops = model.num_hidden_layers * operations(model, num_tokens, 0).layer_forward * num_rows * passes
    return flops / (GPUS["v100"].fp32_tflops * 1e12 * FP32_EFFICIENCY) / 3600


def fine_tuning_hours(preset_name: str, model: ModelConfig, tasks: Sequence[str] = ()) -> float:
    """Of all runs that a preset asks for."""
    preset, hours = PRESETS[preset_name], 0.0
    for task in tasks or preset.tasks:
        num_runs = (
            len(preset.rates.get(task, preset.learning_rates))
            * len(preset.batches.get(task, preset.batch_sizes))
            * preset.num_seeds
        )
        rows = TASKS[task].rows[0] * preset.epochs.get(task, preset.num_epochs)
        hours += num_runs * pass_hours(model, rows, preset.tokens.get(task, preset.max_tokens))
    return hours


def hours_of(command: str) -> float:
    """GPU-hours of one command above; 0 of one that trains nothing large."""
    words = shlex.split(command)
    model = LARGE if "large" in command else BASE
    tasks = [value for option, value in _options(words) if option == "--task"]
    preset = dict(_options(words)).get("--preset", "mslt")
    match words[1:3]:
        case ["train", recipe]:
            return NUM_GPUS * PRETRAINING_H[recipe]
        case ["evaluate", "glue"]:
            return fine_tuning_hours(preset, model, tasks)
        case ["exit", "train"]:  # both stages
            return 2 * fine_tuning_hours(preset.replace("paper", "deebert"), model, tasks)
        case ["pool", "train"]:
            epochs = sum(map(float, dict(_options(words))["--backbone-epochs"].split(",")))
            return epochs * sum(_one_epoch(model, task, passes=3) for task in tasks)
        case ["pool", "search"]:  # heads on the hidden states of one pass
            return sum(_one_epoch(model, task, passes=1) for task in tasks)
        case ["probe", "senteval"]:
            num_models = 1 + len(PRESETS["convexity"].tasks) * any("*" in word for word in words)
            return num_models * pass_hours(BASE, PROBE_ROWS, PROBE_TOKENS, passes=1)
        case ["probe", "mlm"]:
            return pass_hours(BASE, MLM_PROBE_ROWS)
    return 0.0


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((option, value) for option, value in pairwise(words) if option.startswith("--"))


def _one_epoch(model: ModelConfig, task: str, passes: int) -> float:
    if task == "SQuAD":
        return pass_hours(model, SQUAD_ROWS, SQUAD_TOKENS, passes)
    preset = PRESETS["bertvision"]
    return pass_hours(model, TASKS[task].rows[0], preset.tokens.get(task, preset.max_tokens), passes)


def _table(rows: Sequence[tuple[str, dict[str, float]]]) -> tuple[tuple[str, ...], ...]:
    columns = list(dict.fromkeys(name for _, scores in rows for name in scores))
    return (
        ("", *columns),
        *((name, *(f"{scores[c]:,.10g}" if c in scores else "–" for c in columns)) for name, scores in rows),
    )


def _with_hours(rows: Sequence[paper.Reported]) -> tuple[tuple[str, ...], ...]:
    return _table(
        [
            (row.name, {"steps": row.steps, **({} if row.hours is None else {"hours": row.hours}), **row.scores})
            for row in rows
        ]
    )


def _tasks(names: Sequence[str]) -> str:
    return " ".join(f"--task {name}" for name in names)


_DATA = "mslt data prepare data-wikipedia-books data/shards"
_SIZES = ("base", "large")


def _pairs(sizes: Sequence[str], test_submission: bool = False) -> tuple[str, ...]:
    """Both runs of every size, pretrained, fine-tuned and side by side."""
    full_first = [name for size in sizes for name in (f"bert-{size}-full", f"bert-{size}")]
    return (
        _DATA,
        *(f"mslt train {name} --shards data/shards" for name in full_first),
        *(f"mslt evaluate glue runs/{name}{f' --test-submission {name}.zip' * test_submission}" for name in full_first),
        *(f"mslt compare runs/bert-{size}-full runs/bert-{size} --glue mslt" for size in sizes),
    )


def _shorter(name: str, extends: str, schedule: str) -> tuple[str, ...]:
    """A run of fewer steps than its recipe's."""
    return (
        f"printf 'extends: {extends}\\nschedule: {schedule}\\n' > {name}.yaml",
        f"mslt train {name}.yaml --shards data/shards",
        f"mslt evaluate glue runs/{name}",
    )


_EXIT_TASKS = PRESETS["deebert"].tasks
_TWO_TASKS = ("SST-2", "MRPC")  # of Figures 3 and 5


def _exit(size: str, tasks: Sequence[str], with_bench: bool = False) -> tuple[str, ...]:
    """Both stages of both models of a size on each task, and what the sweep of all of them draws."""
    models = {f"bert-{size}-uncased": "paper", f"roberta-{size}": "paper-roberta"}
    folders = {f"exits/{model}-{task}": (model, task, preset) for model, preset in models.items() for task in tasks}
    return (
        *(f"mslt exit train {model} --task {task} --preset {preset} --out {folder}"
          for folder, (model, task, preset) in folders.items()),
        *(f"mslt exit bench {folder}" for folder in folders if with_bench),
        f"mslt exit sweep {' '.join(folders)} --out report",
    )  # fmt: skip


_POOLED = ("MNLI", "QNLI", "QQP", "RTE", "SST-2", "MRPC", "CoLA", "STS-B", "SQuAD")


def _pooled(size: str) -> tuple[str, ...]:
    """Encoders fine-tuned for an epoch, and the best of a hundred heads on each."""
    return (
        f"mslt pool train bert-{size}-uncased {_tasks(_POOLED)} --backbone-epochs 1 --out {size}",
        *(f"mslt pool search {size}/{task}-epochs-1/backbone --task {task} --method adapter --trials 100 --seeds 1 "
          f"--cache states/{size} --out search/{size}" for task in _POOLED),
    )  # fmt: skip


_SURGERY = f"--preset convexity {_tasks(paper.SURGERY_TASKS)}"
_TUNED = "tuned/models/*/*_seed=[0-9]/"  # a model of each task: that of the median seed
_SENTEVAL = "git clone https://github.com/facebookresearch/SentEval"
_FORETOLD = Ours(
    "foretold from data sheets, if it was fp32 over 100 Gb/s with gradients sent after the backward pass, which the "
    "paper does not say: 81.5 h in full, 39.6 in stages; the paper's 41 h for 480,000 steps scale to 85.4, and it has "
    "40. BERT-Large comes out 1.5 times as long",
    "2026-11-21-paper-cluster.md",
)
_SMALL = Ours(
    "6 layers × 256, by measured time: `mslt` comes to what full training has after 1.4 million tokens in "
    "0.89 of its time",
    "2026-11-23-schedules-cpu.md",
)
_EXITS = Ours(
    "MiniLM on 4,000 sentences of SST-2, half a point lost: 15 % of the layers saved by the paper's ramps, 27 % by "
    "ours, 56 % by ours on means of tokens",
    "2026-11-22-exit-options-minilm-cpu.md",
)
_EXITS_BY_CLOCK = Ours(
    "MiniLM on SST-2: where 40 % of the layers are saved, 30.5 % of the time in batches of 32 and row by row with "
    "means of tokens (0.2 points lost), 36.1 % and 30.6 % with the first (2.2 lost)",
    "2026-11-22-exit-speed-minilm-cpu.md",
)
_HEADS = Ours(
    "MiniLM, fine-tuned on SST-2 for two epochs and frozen: a head of 10,250 weights 82.9, the fine-tuned model 83.3; "
    "untuned, heads learn nothing of MRPC and RTE in an epoch",
    "2026-11-22-pool-search-minilm-cpu.md",
)
_PROBED = Ours(
    "MiniLM, tasks made of a small treebank: eight of ten best inside and worse at the last hidden state",
    "2026-11-23-probes-minilm-cpu.md",
)
_READ_BACK = Ours(
    "MiniLM: 98.0 % at the first layer, falling with each to 83.8 at the last; no recovery there",
    "2026-11-23-probes-minilm-cpu.md",
)


def reproductions() -> list[Reproduction]:
    """All of them, in the papers' order."""
    surgery = {title: _table([(row.name, row.scores) for row in rows]) for title, rows in paper.SURGERY.items()}
    table_1, table_2 = surgery.values()
    maps = 'mslt attention runs/bert-base/stage-5/model --text "The cat sat on the mat."'
    return [
        Reproduction(
            "mslt-t2", "Table 2: GLUE, validation, equal steps", _pairs(_SIZES), _with_hours(paper.EQUAL_STEPS)
        ),
        Reproduction(
            "mslt-t3", "Table 3: GLUE, validation, equal time",
            (
                _DATA,
                "mslt train bert-base --shards data/shards",
                "mslt evaluate glue runs/bert-base",
                *_shorter("base-480k", "bert-base-full", "{name: full, steps: 480000}"),
                "mslt compare runs/base-480k runs/bert-base --glue mslt",
                *_shorter("large-500k", "bert-large", "{name: mslt, k: 4, steps: 500000, retrain_share: 0.2}"),
                *_shorter("large-230k", "bert-large-full", "{name: full, steps: 230000}"),
                "mslt compare runs/large-230k runs/large-500k --glue mslt",
            ),
            _with_hours(paper.EQUAL_TIME), ours=_FORETOLD,
        ),
        Reproduction(
            "mslt-t4", "Table 4: GLUE, test", _pairs(_SIZES, test_submission=True), _with_hours(paper.TEST),
            "Before comparing, give each zip to gluebenchmark.com, and write what it answers into test-scores.json "
            "beside the run's results.json.",
        ),
        Reproduction(
            "mslt-f2", "Figure 2: one head at two layers",
            (_DATA, "mslt train bert-base-full --shards data/shards",
             'mslt attention runs/bert-base-full/stage-1/model@4,10 --text "The cat sat on the mat." --head 3 '
             "--picture head.png"),
            note="Of a sentence; layers and heads count from 0 here, from 1 in the paper (L5 H4, L11 H4).",
        ),
        Reproduction(
            "mslt-f3", "Figure 3: where heads look before and after growth",
            (_DATA, "mslt train bert-base --shards data/shards",
             maps.replace("model", "model@6-11 runs/bert-base/stage-5/model@0-5 runs/bert-base/stage-2/model", 1)
             + " --picture maps.png"),
        ),
        Reproduction(
            "mslt-f4", "Figure 4: loss over hours, with stage bands",
            (*_pairs(("base",))[:3], "mslt report runs/bert-base-full runs/bert-base --out report.html"), ours=_SMALL,
        ),
        Reproduction(
            "deebert-t1", "Table 1: scores and time saved at three thresholds", _exit("base", _EXIT_TASKS),
            (("model", "method", "score, or change", "time saved, %"),
             *((row.model, row.method, _changes(row), _shares(row.savings)) for row in paper.EARLY_EXIT)),
            "The paper's are of the test splits and by the clock; ours of the validation splits and by layers, which "
            "`mslt exit bench` measures by the clock.",
            _EXITS,
        ),
        *(
            Reproduction(
                f"deebert-f{number}", f"Figure {number}: {what}", _exit(size, tasks, with_bench=number == 3),
                _EXIT_FIGURE_6 if number == 6 else (), ours=_EXITS_BY_CLOCK if number == 3 else None,
            )
            for number, what, size, tasks in (
                (2, "quality over time saved", "base", _EXIT_TASKS),
                (3, "expected and measured saving", "base", _TWO_TASKS),
                (4, "each exit alone", "base", _EXIT_TASKS),
                (5, "the same for Large", "large", _TWO_TASKS),
                (6, "where rows leave", "base", ("SST-2",)),
            )
        ),
        Reproduction(
            "bv-t1", "Table 1: a head on all hidden states beside full fine-tuning",
            (*_pooled("base"), *_pooled("large")), _table([(row.name, row.scores) for row in paper.POOLING]),
            "MRPC is another cut of the same pairs there. The rows of BERT are lower than its repository has them, and "
            "heads were chosen on the split that is reported; `mslt pool search` sets training rows aside.", _HEADS,
        ),
        Reproduction(
            "bv-t2", "Table 2: how much smaller, and what is kept",
            ("mslt pool train bert-base-uncased --task RTE --backbone-epochs 1 --adapter-width 128 --out tuned",),
            (("model", "times smaller", "% of the scores"),
             *((name, f"{ratio:g}", str(share)) for name, ratio, share in paper.COMPRESSION)),
            "209 counts the head alone: the encoder still runs for it. `mslt pool` prints what is deployed, too.",
        ),
        Reproduction(
            "bv-f1", "Figure 1: fine-tuned for longer, heads beside it",
            ("mslt pool train bert-base-uncased --task RTE --backbone-epochs "
             "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1,2,3,4,5,6 --out curve",),
        ),
        Reproduction(
            "bv-e", "Section 5.1: where a head is right and wrong",
            (f"mslt pool train bert-base-uncased {_tasks(('RTE', 'MRPC'))} --backbone-epochs 1 --out tuned",
             *(f"mslt pool errors tuned/{task}-epochs-1/backbone tuned/{task}-epochs-1/{task}-adapter-16-seed-0"
               for task in ("RTE", "MRPC"))),
            paper.POOLING_ERRORS, "The figures of RTE there imply accuracies other than its Table 1's.",
        ),
        Reproduction(
            "conv-t1", "Table 1: a second objective, an extra layer, copied layers",
            ("hf download google-bert/bert-base-uncased --local-dir base",
             f"mslt evaluate glue base {_SURGERY} --out plain",
             f"mslt evaluate glue base {_SURGERY} --multi-objective --out multi-objective",
             f"mslt evaluate glue base {_SURGERY} --extra-layer --out extra-layer",
             "mslt grow base copied --copy 9 --to 10,11", f"mslt evaluate glue copied {_SURGERY} --out copy",
             "mslt probe tables plain=plain multi-objective=multi-objective extra-layer=extra-layer copy=copy"),
            table_1, "No method wins on average.",
        ),
        Reproduction(
            "conv-t2", "Table 2: the top two layers dropped",
            ("hf download google-bert/bert-base-cased --local-dir cased", "mslt grow cased short --drop-top 2",
             f"mslt evaluate glue cased {_SURGERY} --out plain", f"mslt evaluate glue short {_SURGERY} --out drop",
             "mslt probe tables plain=plain drop=drop"),
            table_2,
        ),
        Reproduction(
            "conv-f1", "Figure 1: what fine-tuning changes, probe by probe",
            (_SENTEVAL, "mslt evaluate glue bert-base-uncased --preset convexity --save-models --out tuned",
             f"mslt probe senteval bert-base-uncased {_TUNED} --raw --data-dir SentEval/data/probing",
             f"mslt probe compare bert-base-uncased {_TUNED} --raw --picture tuned.png"),
        ),
        Reproduction(
            "conv-f2", "Figure 2: probes layer by layer",
            (_SENTEVAL, "mslt probe senteval bert-base-uncased --raw --data-dir SentEval/data/probing"),
            ours=_PROBED,
        ),
        Reproduction(
            "conv-f4", "Figure 4: can a word be read back from a layer",
            ("mslt probe mlm bert-base-uncased --text train-v1.1.json",), ours=_READ_BACK,
        ),
    ]  # fmt: skip


_EXIT_FIGURE_6 = (
    ("model", "threshold", "time saved, %", "points lost"),
    *((each.model, f"{each.threshold:g}", str(each.saving), f"{each.drop:g}") for each in paper.EXIT_HISTOGRAMS),
)


def _changes(row: paper.EarlyExit) -> str:
    """Scores of a whole model, of others what they gain or lose."""
    form = ".1f" if row.method == "whole" else "+.1f"
    return ", ".join(f"{task} {value:{form}}" for task, value in row.scores.items())


def _shares(of: dict[str, float]) -> str:
    return ", ".join(f"{task} {value:g}" for task, value in of.items()) or "–"


def status(one: Reproduction) -> str:
    hours = f"about {one.gpu_hours:,.0f} GPU-hours" if one.gpu_hours >= 1 else "less than a GPU-hour"
    return f"not run here, needs {hours}"


def markdown(every: Sequence[Reproduction]) -> list[str]:
    """The README's summary."""
    lines = ["| `mslt reproduce` | what | state | in small, here |", "| --- | --- | --- | --- |"]
    for one in every:
        ours = "" if one.ours is None else f"{one.ours.found} ([record]({RECORDS}/{one.ours.record}))"
        lines.append(f"| {one.name} | {one.what} | {status(one)} | {ours} |")
    return lines
