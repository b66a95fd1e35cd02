"""Every table and figure of the four papers: the command that makes it, what the paper has, and what we have.

Hours are of one V100 and rough: of pretraining the paper's own, of fine-tuning floating-point operations at the share
of its peak that mslt.hardware names. Nothing of ours stands here without a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mslt.config import ModelConfig
from mslt.cost import operations
from mslt.evaluate.glue_tasks import PRESETS, TASKS
from mslt.hardware import GPUS, HALF_EFFICIENCY
from mslt.report import paper

RECORDS = "benchmarks/records"
PAPERS = {
    "mslt": "Yang et al. 2020, Progressively Stacking 2.0 (arXiv:2011.13635)",
    "deebert": "Xin et al. 2020, DeeBERT (arXiv:2004.12993)",
    "bv": "BERTVision",
    "conv": "The convexity of BERT",
}


@dataclass(frozen=True)
class Ours:
    """What was measured here, in words, and the record that says so: a file name below RECORDS."""

    found: str
    record: str


@dataclass(frozen=True)
class Reproduction:
    """`name` begins with its paper's. `commands` make it, in order; `gpu_hours` is what they need at the paper's size;
    `reported` are the paper's figures, a header and rows, none for a picture. `ours` was measured at another size."""

    name: str
    what: str
    commands: tuple[str, ...]
    gpu_hours: float
    reported: tuple[tuple[str, ...], ...] = ()
    ours: Ours | None = None


def _bert(num_layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=num_layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width,
        vocab_size=30522,
    )  # fmt: skip


BASE, LARGE = _bert(12, 768), _bert(24, 1024)


def pass_hours(model: ModelConfig, num_rows: int, num_tokens: int = 128, passes: int = 3) -> float:
    """Hours of a V100 for so many passes through the layers, a forward pass counting one, a backward pass two."""
    flops = model.num_hidden_layers * operations(model, num_tokens, 0).layer_forward * num_rows * passes
    return flops / (GPUS["v100"].half_tflops * 1e12 * HALF_EFFICIENCY) / 3600


def fine_tuning_hours(preset_name: str, model: ModelConfig, tasks: Sequence[str] | None = None) -> float:
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


_GPUS_THERE = 32  # V100s, in Yang et al.
_FULL_H, _STAGED_H = 41 / 0.48, 40.0  # 480,000 of 1M steps in 41 h; all of them in 40 h (their Table 3)
_PAIR_H = _GPUS_THERE * (_FULL_H + _STAGED_H)
_LARGE_PAIR_H = _GPUS_THERE * (42 / 0.23 + 42 / 0.5)
_PRETRAIN = ("mslt train bert-base --shards data/shards", "mslt train bert-base-full --shards data/shards")
_GLUE_OF_BOTH = ("mslt evaluate glue runs/bert-base", "mslt evaluate glue runs/bert-base-full")
_COMPARE = "mslt compare runs/bert-base runs/bert-base-full --glue mslt"
_EXIT_TASKS = PRESETS["deebert"].tasks
_TWO_TASKS = ("SST-2", "MRPC")  # of Figures 3 and 5
_POOL_BACKBONE_H = fine_tuning_hours("bertvision", BASE)
_CONVEXITY_H = fine_tuning_hours("convexity", BASE)
_SURGERY_H = fine_tuning_hours("convexity", BASE, paper.SURGERY_TASKS)
_PROBE_ROWS = 10 * 120_000  # ten tasks of SentEval
_PROBE_H = pass_hours(BASE, _PROBE_ROWS, 32, passes=1)
_FORETOLD = Ours(
    "hours foretold from data sheets: 81.5 in full, 39.6 in stages; reported are 85.4 and 40",
    "2026-11-21-paper-cluster.md",
)
_SMALL = Ours(
    "12 layers × 128 on Wikipedia and books: each of five stages lowers the held-out loss",
    "2026-11-21-real-text-cpu.md",
)


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


def _exit_hours(model: ModelConfig, tasks: Sequence[str]) -> float:
    """Of both stages of BERT and RoBERTa."""
    return 2 * sum(fine_tuning_hours(preset, model, tasks) for preset in ("deebert", "deebert-roberta"))


def reproductions() -> list[Reproduction]:
    """All of them, in the papers' order."""
    both_h = 2 * fine_tuning_hours("mslt", BASE)
    surgery = {title: _table([(row.name, row.scores) for row in rows]) for title, rows in paper.SURGERY.items()}
    table_1, table_2 = surgery.values()
    return [
        Reproduction(
            "mslt-t2", "Table 2: GLUE, validation, equal steps", (*_PRETRAIN, *_GLUE_OF_BOTH, _COMPARE),
            _PAIR_H + _LARGE_PAIR_H + both_h, _with_hours(paper.EQUAL_STEPS),
        ),
        Reproduction(
            "mslt-t3", "Table 3: GLUE, validation, equal time",
            (
                _PRETRAIN[0],
                "printf 'extends: bert-base-full\\nschedule: {name: full, steps: 480000}\\n' > shorter.yaml",
                "mslt train shorter.yaml --shards data/shards",
                "mslt evaluate glue runs/bert-base",
                "mslt evaluate glue runs/shorter",
                "mslt compare runs/bert-base runs/shorter --glue mslt",
            ),
            _GPUS_THERE * (41 + _STAGED_H) + both_h, _with_hours(paper.EQUAL_TIME), _FORETOLD,
        ),
        Reproduction(
            "mslt-t4", "Table 4: GLUE, test",
            (*_PRETRAIN, *(f"{line} --test-submission {line.split('/')[-1]}.zip" for line in _GLUE_OF_BOTH), _COMPARE),
            _PAIR_H + both_h, _with_hours(paper.TEST),
        ),
        Reproduction(
            "mslt-f3", "Figures 2 and 3: where heads look",
            (_PRETRAIN[0], 'mslt attention runs/bert-base/stage-5/model@6-11 runs/bert-base/stage-5/model@0-5 '
             'runs/bert-base/stage-2/model --text "The cat sat on the mat." --picture maps.png'),
            _GPUS_THERE * _STAGED_H,
        ),
        Reproduction(
            "mslt-f4", "Figure 4: loss over hours, with stage bands",
            (*_PRETRAIN, "mslt report runs/bert-base runs/bert-base-full --out report.html"), _PAIR_H, ours=_SMALL,
        ),
        Reproduction(
            "deebert-t1", "Table 1: scores and time saved at three thresholds", _exit("base", _EXIT_TASKS),
            _exit_hours(BASE, _EXIT_TASKS),
            (("model", "method", "scores, or what is lost", "saved, %"),
             *((row.model, row.method, _scores(row.scores), _scores(row.savings) or "–") for row in paper.EARLY_EXIT)),
        ),
        *(
            Reproduction(
                f"deebert-f{number}", f"Figure {number}: {what}", _exit(size, tasks, with_bench=number == 3),
                _exit_hours(BASE if size == "base" else LARGE, tasks),
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
            ("mslt pool search bert-base-uncased --task RTE --trials 100 --seeds 5 --cache states --out search",),
            # A search's trials: whole fine-tunings, and heads at a forward pass each.
            100 * (_POOL_BACKBONE_H + _POOL_BACKBONE_H / 3),
            _table([(row.name, row.scores) for row in paper.POOLING]),
        ),
        Reproduction(
            "bv-t2", "Table 2: how much smaller, and what is kept",
            ("mslt pool train bert-base-uncased --task RTE --backbone-epochs 1 --adapter-width 128 --out tuned",),
            _POOL_BACKBONE_H,
            (("model", "times smaller", "% of the scores"),
             *((name, f"{ratio:g}", str(share)) for name, ratio, share in paper.COMPRESSION)),
        ),
        Reproduction(
            "conv-t1", "Table 1: a second objective, an extra layer, copied layers",
            ("mslt evaluate glue bert-base-uncased --preset convexity --multi-objective --out multi-objective",
             "mslt evaluate glue bert-base-uncased --preset convexity --extra-layer --out extra-layer",
             "hf download google-bert/bert-base-uncased --local-dir base",
             "mslt grow base copied --copy 9 --to 10,11", "mslt evaluate glue copied --preset convexity",
             "mslt probe tables multi-objective=multi-objective extra-layer=extra-layer "
             "copy=copied-evaluation/glue-convexity"),
            4 * _SURGERY_H, table_1,
        ),
        Reproduction(
            "conv-t2", "Table 2: the top two layers dropped",
            ("hf download google-bert/bert-base-cased --local-dir cased", "mslt grow cased short --drop-top 2",
             "mslt evaluate glue short --preset convexity",
             "mslt probe tables drop=short-evaluation/glue-convexity"),
            2 * _SURGERY_H, table_2,
        ),
        Reproduction(
            "conv-f1", "Figure 1: what fine-tuning changes, probe by probe",
            ("mslt evaluate glue bert-base-uncased --preset convexity --save-models",
             "mslt probe senteval bert-base-uncased TUNED --data-dir probing",
             "mslt probe compare bert-base-uncased TUNED --picture tuned.png"),
            _CONVEXITY_H + 10 * _PROBE_H,
        ),
        Reproduction(
            "conv-f2", "Figure 2: probes layer by layer",
            ("mslt probe senteval bert-base-uncased --data-dir probing",), _PROBE_H,
        ),
        Reproduction(
            "conv-f4", "Figure 4: can a word be read back from a layer",
            ("mslt probe mlm bert-base-uncased --text train-v1.1.json",), pass_hours(BASE, 3 * 18_896),
        ),
    ]  # fmt: skip


def _scores(of: dict[str, float]) -> str:
    return ", ".join(f"{task} {value:g}" for task, value in of.items())


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
