"""One page that tells all about runs: a single HTML file that opens without a network."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined

from mslt import metrics
from mslt.cost import PARTS, operations, scaled, stage_cost, step_parts
from mslt.data.manifest import MANIFEST_FILE, read_manifest
from mslt.engine.ds_config import reduced_bytes
from mslt.errors import MsltError
from mslt.files import write_text
from mslt.hardware import tabled
from mslt.plan import Stage, autocast_dtype, sources_in_words, trainable_in_words
from mslt.report import charts
from mslt.report.charts import Curves
from mslt.report.heatmap import read_heatmaps_csv
from mslt.rundir import RunDir, evaluation_folder, read_plan, read_summaries

MOST_BYTES = 5_000_000  # of the page; pictures beyond it are left out
BESIDE_PICTURES = 2_500_000  # of it, for the drawing library (0.9 MB) and the curves of some ten runs
BESIDE = ("start", "log", "evaluation", "checkpoint", "finish")  # what a stage takes beside its steps


@dataclass(frozen=True)
class Table:
    """`header` and `rows` as text; the first column stands left, the others right."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    title: str
    spec: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    title: str
    png: str  # base64


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[Table | Chart | Picture]


def write_report(runs: list[Path], out: Path) -> int:
    """Write the page to `out` and return its bytes. Runs may be under way. MsltError for what is no run, and for two
    runs of one name."""
    read = read_runs(runs)
    sections = [
        Section("Outcome", [outcome_table(read)]),
        Section("Plan", [Chart(run.label, charts.plan_chart(run)) for run in read]),
        Section("Loss", loss_charts(read)),
        Section("Where the time goes", [*time_parts(read), *traffic_tables(read)]),
        Section("Rates", rate_charts(read)),
        Section("Starts", [starts_table(read)]),
        Section("Evaluation", evaluation_parts(runs, read)),
        Section("Provenance", provenance_tables(runs, read)),
    ]
    recipes = {run.label: (path / "recipe.yaml").read_text() for run, path in zip(read, runs, strict=True)}
    page = rendered(", ".join(run.label for run in read), [each for each in sections if each.parts], recipes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return len(page.encode())


def read_runs(runs: list[Path]) -> list[Curves]:
    """MsltError as from `write_report`."""
    labels = [path.resolve().name for path in runs]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in runs]
    if len(set(labels)) < len(labels):
        raise MsltError(f"{', '.join(labels)}: one run stands there twice")
    read = []
    for label, path in zip(labels, runs, strict=True):
        run = RunDir(path)
        read.append(
            Curves(label, read_plan(run), list(metrics.read(run.metrics)), list(metrics.read(run.starts)),
                   read_summaries(run))
        )  # fmt: skip
        if not read[-1].records:
            raise MsltError(f"{path}: nothing has been logged yet; wait for its first evaluation")
    return read


def rendered(title: str, sections: list[Section], recipes: dict[str, str]) -> str:
    """The page. Pictures that would make it more than MOST_BYTES are left out."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda part: type(part).__name__
    environment.filters["script"] = lambda spec: json.dumps(spec).replace("<", "\\u003c")  # ends no script element
    template = environment.from_string(files("mslt.report").joinpath("page.html.jinja").read_text())
    room = MOST_BYTES - BESIDE_PICTURES
    for section in sections:
        for picture in [part for part in section.parts if isinstance(part, Picture)]:
            room -= len(picture.png)
            if room < 0:
                section.parts[section.parts.index(picture)] = Picture(
                    f"{picture.title}: left out, the page is full", ""
                )
    return template.render(
        title=title,
        sections=sections,
        recipes=recipes,
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed"),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def outcome_table(runs: list[Curves]) -> Table:
    """What each run reached; speed beside the first."""
    whole_s: list[float | None] = []  # of a step, over all stages
    rows = []
    for run in runs:
        steps = sum(summary["steps"] for summary in run.summaries)
        train_s = sum(summary["spent_s"]["train"] for summary in run.summaries)
        heldout = run.of("evaluation")[-1] if run.of("evaluation") else {}
        step_s = train_s / steps if steps else 0.0
        done = len(run.summaries) == len(run.plan.stages)
        whole_s.append(step_s if done else None)
        rows.append(
            [
                run.label,
                "done" if done else f"stage {len(run.summaries) + 1} of {len(run.plan.stages)}",
                f"{steps:,}",
                _number(heldout.get("mlm_loss"), ".4f"),
                _number(heldout.get("mlm_accuracy"), ".1%"),
                _number(heldout.get("nsp_loss"), ".4f"),
                _duration(train_s),
                f"{whole_s[0] / step_s:.2f}×" if whole_s[0] and whole_s[-1] else "–",
                f"{sum(summary['reduced_bytes'] for summary in run.summaries) / 1e9:,.2f} GB",
            ]
        )
    header = ["run", "state", "steps", "held-out MLM", "accuracy", "NSP", "training", "speed a step", "reduced"]
    return Table("", header, rows, "Held-out losses in nats, at the last evaluation; the rest of finished stages.")


def loss_charts(runs: list[Curves]) -> list[Table | Chart | Picture]:
    note = (
        "Points are held-out, thin lines training. Below, each run's stages with their number of layers; dashed lines "
        "are where a run went on after a stop. The axis leaves out the first fall."
    )
    return [
        Chart("over steps", charts.loss_chart(runs, "steps"), note),
        Chart("over time", charts.loss_chart(runs, "time")),
    ]


def time_parts(runs: list[Curves]) -> list[Table | Chart | Picture]:
    """The chart of a step's parts, and a table of what stages take beside their steps."""
    if not any(run.summaries for run in runs):
        return []
    beside = [
        [run.label, str(each["stage"]), _duration(each["spent_s"]["train"])]
        + [_duration(each["spent_s"].get(what, 0.0)) for what in BESIDE]
        for run in runs
        for each in run.summaries
    ]
    foretold = []
    for run in runs:
        for index, parts in charts.predicted(run).items():
            spent, steps = run.summaries[index]["spent_s"], run.summaries[index]["steps"]
            cells = [f"{1000 * spent.get(part, 0.0) / steps:,.1f} / {1000 * parts[part]:,.1f}" for part in PARTS]
            foretold.append([run.label, str(index + 1), *cells])
    note = (
        "The diamond is what operations and trainable parameters foretell, at the rates of the stage that has most "
        "of them, which has none itself; mslt plan --measure foretells before a run."
    )
    return [
        Chart("a step, part by part", charts.time_chart(runs), note if foretold else ""),
        *([Table("measured / foretold, ms a step", ["run", "stage", *PARTS], foretold)] if foretold else []),
        Table("beside the steps", ["run", "stage", "steps", *BESIDE], beside),
    ]


def traffic_tables(runs: list[Curves]) -> list[Table | Chart | Picture]:
    """Bytes and throughput of every finished stage. MFU is the share of the tabled peak of the GPUs (mslt.hardware)
    that goes into the operations the stage needs."""
    rows = []
    for run in runs:
        for summary in run.summaries:
            stage = run.plan.stages[summary["stage"] - 1]
            step_s = summary["spent_s"]["train"] / summary["steps"]
            flops = _flops(run, stage) / step_s
            foretold = stage_cost(run.plan.model, stage).trainable_parameters * reduced_bytes(run.plan.engine)
            if summary["world_size"] == 1:
                foretold = 0
            mfu = _mfu(run, flops, summary)
            rows.append(
                [
                    run.label, str(summary["stage"]), str(summary["world_size"]),
                    f"{summary['reduced_bytes'] / summary['steps'] / 1e6:,.2f} MB", f"{foretold / 1e6:,.2f} MB",
                    f"{stage.batch_size / step_s:,.1f}", f"{stage.batch_size * stage.sequence_length / step_s:,.0f}",
                    f"{flops / 1e12:,.3f}", "–" if mfu is None else f"{mfu:.0%}",
                ]
            )  # fmt: skip
    header = ["run", "stage", "workers", "reduced a step", "foretold", "samples/s", "tokens/s", "TFLOP/s", "MFU"]
    note = "Bytes that one worker hands to collectives. No MFU where the hardware's peak is not tabled."
    return [Table("bytes and throughput", header, rows, note)] if rows else []


def _flops(run: Curves, stage: Stage) -> float:
    """Of a whole batch's forward and backward pass."""
    model, data = run.plan.model, run.plan.data
    costs = scaled(operations(model, stage.sequence_length, data.max_predictions), stage.batch_size)
    parts = step_parts(costs, model, stage)
    return parts["forward"] + parts["backward"]


def _mfu(run: Curves, flops: float, summary: dict[str, Any]) -> float | None:
    hardware = next((start["hardware"] for start in reversed(run.starts) if start["stage"] == summary["stage"]), None)
    gpu = None if hardware is None else tabled(hardware)
    if gpu is None:
        return None
    peak = gpu.fp32_tflops if autocast_dtype(run.plan.engine) is None else gpu.half_tflops
    return flops / (peak * 1e12 * summary["world_size"])


def rate_charts(runs: list[Curves]) -> list[Table | Chart | Picture]:
    if not any(run.of("train") for run in runs):
        return []
    found: list[Table | Chart | Picture] = [Chart("learning rate", charts.rate_chart(runs))]
    trust = charts.trust_chart(runs)
    if trust is not None:
        found.append(
            Chart("LAMB's trust ratios", trust, "Lines are medians over tensors, bands the lowest to highest.")
        )
    return found


def starts_table(runs: list[Curves]) -> Table:
    rows = []
    for run in runs:
        for start in run.starts:
            when = start["time"].replace("T", " ").removesuffix("+00:00")
            counts = [str(start["stage"]), f"{start['step']:,}", f"{start['steps_again']:,}", str(start["workers"])]
            rows.append([run.label, when, *counts, start["hardware"], start["commit"] or start["mslt"]])
    header = ["run", "UTC", "stage", "at step", "steps again", "workers", "hardware of rank 0", "commit"]
    return Table("", header, rows, "Every time that workers began a stage, or went on with it after a stop.")


def evaluation_parts(paths: list[Path], runs: list[Curves]) -> list[Table | Chart | Picture]:
    """What lies beside the model folders of all stages: scores of GLUE and SQuAD, heat maps, and other pictures."""
    found: list[Table | Chart | Picture] = []
    glue: dict[str, list[tuple[str, str, dict[str, str]]]] = {}
    tasks: dict[str, list[str]] = {}
    squad: list[list[str]] = []
    drawn: list[Chart | Picture] = []
    for run, where, folder in _evaluations(paths, runs):
        for file in sorted(folder.glob("glue-*/results.json")):
            scored = json.loads(file.read_text())["tasks"]
            name = file.parent.name.removeprefix("glue-")
            tasks[name] = list(dict.fromkeys([*tasks.get(name, []), *scored]))
            glue.setdefault(name, []).append((run, where, {task: _score(each) for task, each in scored.items()}))
        for file in sorted(folder.glob("squad*/result.json")):
            result = json.loads(file.read_text())
            scores = result["scores"]
            squad.append([run, where, result["settings"]["version"], f"{scores['exact']:.2f}", f"{scores['f1']:.2f}"])
        for file in sorted(folder.rglob("*.png")):
            name, numbers = f"{run}, {where}: {file.relative_to(folder)}", file.with_suffix(".csv")
            maps = read_heatmaps_csv(numbers) if numbers.exists() else []
            drawn += [Chart(f"{name.removesuffix('.png')}: {each.title}", charts.heatmap_chart(each)) for each in maps]
            if not maps:
                drawn.append(Picture(name, base64.b64encode(file.read_bytes()).decode()))
    for name, rows in glue.items():
        cells = [[run, where, *(scores.get(task, "–") for task in tasks[name])] for run, where, scores in rows]
        note = "Medians of the best setting, in percent; the number of runs in parentheses."
        found.append(Table(f"GLUE, preset {name}", ["run", "", *tasks[name]], cells, note))
    if squad:
        found.append(Table("SQuAD", ["run", "", "version", "exact match", "F1"], squad))
    return [*found, *drawn]


def _evaluations(paths: list[Path], runs: list[Curves]) -> Iterator[tuple[str, str, Path]]:
    for path, run in zip(paths, runs, strict=True):
        for index in range(len(run.plan.stages)):
            folder = evaluation_folder(str(RunDir(path).stage(index).model))
            if folder.is_dir():
                yield run.label, f"stage {index + 1}", folder


def _score(entry: dict[str, Any]) -> str:
    return "failed" if entry["best"] is None else f"{entry['median']:.1%} ({len(entry['headlines'])})"


def provenance_tables(paths: list[Path], runs: list[Curves]) -> list[Table | Chart | Picture]:
    """Commit, versions, plan and corpus of each run."""
    columns = []
    for path, run in zip(paths, runs, strict=True):
        made = json.loads((path / "provenance.json").read_text())
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
        columns.append(
            {
                "directory": str(path), "plan": run.plan.digest()[:16], "mslt": made["mslt"],
                "commit": made["commit"] or "–", "python": made["python"], "platform": made["platform"],
                "versions": versions, "seed": str(run.plan.stages[0].seed), "shards": _corpus(run),
            }
        )  # fmt: skip
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    stages = [
        [run.label, str(number), str(stage.depth), sources_in_words(stage.sources), trainable_in_words(stage),
         f"{stage.steps:,}", f"{stage.batch_size:,}", str(stage.sequence_length), f"{stage.learning_rate.peak:g}"]
        for run in runs
        for number, stage in enumerate(run.plan.stages, 1)
    ]  # fmt: skip
    header = ["run", "stage", "layers", "from", "trains", "steps", "batch", "tokens", "peak rate"]
    return [Table("stages", header, stages), Table("where it comes from", ["", *(run.label for run in runs)], rows)]


def _corpus(run: Curves) -> str:
    """Of the manifest, where the shards are still what the run read."""
    folder = Path(run.plan.data.shards)
    sha256 = (run.plan.shards_sha256 or "–")[:16]
    if not (folder / MANIFEST_FILE).is_file():
        return f"{sha256}, not in {folder} any more"
    manifest = read_manifest(folder)
    if manifest.hash != run.plan.shards_sha256:
        return f"{sha256}; {folder} holds another corpus now"
    sources = ", ".join(f"{source.kind} {source.kept.documents:,} documents" for source in manifest.sources)
    return (
        f"{sha256}: {sources}; {manifest.splits['train'].tokens:,} tokens to train on, "
        f"{manifest.splits['validation'].tokens:,} held out; vocabulary {manifest.tokenizer.vocab_size:,}"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:,.1f} s"
        if seconds < 120
        else f"{seconds / 60:,.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.2f} h"
    )
