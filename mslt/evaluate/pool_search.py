"""Heads, a linear probe and the whole model fine-tuned, each at the best settings that as many trials find.

Trials are proposed by TPE (Bergstra et al. 2011) and judged on training rows that are set aside, never on the split
that is reported; the best setting of each method is then trained anew on all training rows with several seeds.

An encoder that was fine-tuned on the task has learnt the rows that are set aside, too: what trials of heads score
there is then too good, and the choice among them the poorer for it. The search says so; the split that is reported
stays clean.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate.fine_tune import FineTuning, fine_tune
from mslt.evaluate.fine_tune import Tell as Progress
from mslt.evaluate.opening import digest, tuned_on
from mslt.evaluate.pool import (
    Backbone,
    Diverged,
    Pooled,
    head_settings,
    logits_of,
    open_whole,
    refuse_not_finite,
    score_heads,
    score_whole,
    states_of,
    train_heads,
    whole_batch_of,
    whole_logits,
)
from mslt.evaluate.pool_cache import StatesCache
from mslt.evaluate.pool_data import PoolTask, Scores, collate_of, split_off
from mslt.evaluate.pool_runs import CacheOptions, open_cache, train_batches
from mslt.evaluate.result import refuse_other, refused_if_damaged
from mslt.files import lock_alone, write_json
from mslt.heads.pooling import HeadSettings, PadStates, Tokens, new_head, refuse_unfit, save_head, sizes_of
from mslt.provenance import provenance

METHODS = ("adapter", "unshared", "mix", "mean", "last", "probe", "full")
DEFAULT_METHODS = ("adapter", "last", "probe", "full")
LOOKS = 4  # into an epoch, at each of which a trial can be pruned
STARTUP_TRIALS = 5  # before any is
BATCH_SIZES = (16, 32, 64)
ADAPTER_WIDTHS = (8, 16, 32, 64, 128, 256)
# Learning rates: of heads BERTVision's, from which it draws evenly; of the baselines wide around what they are usually
# given, evenly in the logarithm, for of 1e-6 to 1e-3 only one draw in ten suits a whole model, and none a linear probe.
RATES = {"head": (1e-6, 1e-3, False), "probe": (1e-4, 1e-1, True), "full": (1e-6, 1e-4, True)}

_MADE_ANEW = "remove it, and the same command makes it anew"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """`num_trials` and `choose_share` of the training rows are the budget of each method. `full_from` is what the whole
    model is fine-tuned from, where that is not the frozen encoder's own checkpoint."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    num_trials: int = 100
    num_seeds: int = 5
    num_epochs: int = 1
    layers: str = "all"
    tokens: Tokens = "flatten"
    pad_states: PadStates = "zero"
    skip: bool = False
    choose_share: float = 0.1
    seed: int = 0
    precision: str = "fp32"
    full_from: str | None = None
    new_pooler: bool = False


@dataclass(frozen=True)
class Setting:
    """What a trial tries; `adapter_width` is of heads that project."""

    learning_rate: float
    batch_size: int
    adapter_width: int = 0


@dataclass(frozen=True)
class Bench:
    """What all trials of a task share. `rows` are trained on, `chosen` set aside."""

    backbone: Backbone
    task: PoolTask
    search: Search
    cache: StatesCache | None
    rows: list[int]
    chosen: list[int]


def asked(trial: optuna.Trial, method: str) -> Setting:
    kind = method if method in RATES else "head"
    low, high, is_log = RATES[kind]
    rate = trial.suggest_float("learning_rate", low, high, log=is_log)
    batch_size = trial.suggest_categorical("batch_size", BATCH_SIZES)
    width = trial.suggest_categorical("adapter_width", ADAPTER_WIDTHS) if kind == "head" else 0
    return Setting(rate, int(batch_size), int(width))


def settings_of(bench: Bench, method: str, width: int) -> HeadSettings:
    """A head's; of `probe` a linear layer on the last hidden state's [CLS], of spans on each of its tokens."""
    config, search = bench.backbone.model.config, bench.search
    states = states_of(search.layers, config.num_hidden_layers)
    if method == "probe":
        return head_settings(bench.task, config.hidden_size, states, "last", 0, "first", search.pad_states, False)
    return head_settings(bench.task, config.hidden_size, states, method, width, search.tokens, search.pad_states,
                         search.skip)  # fmt: skip


class Trained:
    """A method at one setting, trained with one seed on some rows, look by look."""

    def __init__(self, bench: Bench, method: str, setting: Setting, seed: int, rows: Sequence[int]) -> None:
        self.bench, self.task, self.rows = bench, bench.task, rows
        self.training = FineTuning(
            setting.learning_rate, setting.batch_size, bench.search.num_epochs, seed, precision=bench.search.precision
        )
        model = bench.backbone.model
        self.whole: Any
        if method == "full":
            source = bench.search.full_from or bench.backbone.source
            self.whole = open_whole(source, self.task, seed, bench.search.new_pooler).to(model.device)
            self.collate = collate_of(self.task, self.whole.config, bench.backbone.tokenizer)
            self.batch_of = whole_batch_of(self.task.train, self.collate)
        else:
            self.head = new_head(settings_of(bench, method, setting.adapter_width), model, seed)
            self.whole = Pooled(model, [self.head])
            self.collate = bench.backbone.collate(self.task, bench.search.pad_states == "keep")
            self.batch_of = train_batches(self.task, self.collate, self.whole.states, bench.cache)
        self.is_full = method == "full"

    def looks(self, num_looks: int) -> Iterator[float]:
        """Train; yields as `fine_tune`."""
        if self.is_full:
            yield from fine_tune(self.whole, self.rows, self.batch_of, self.training, looks=num_looks)
        else:
            rates = [self.training.learning_rate]
            yield from train_heads(self.whole, self.rows, self.batch_of, self.training, rates, num_looks)

    def chosen_headline(self) -> float:
        """On the rows that were set aside."""
        rows, examples, precision = self.bench.chosen, self.task.train, self.training.precision
        if self.is_full:
            said = whole_logits(self.whole, rows, examples, self.collate, precision)
        else:
            (said,) = logits_of(self.whole, rows, examples, self.batch_of, precision)
            refuse_not_finite(said, "the head")
        return self.task.headline({"chosen": self.task.score("train", rows, said)})

    def scores(self) -> dict[str, Scores]:
        """On the splits that are reported. Diverged where nothing finite is said."""
        if self.is_full:
            return score_whole(self.whole, self.task, self.collate, self.training.precision)
        (found,) = score_heads(self.whole, self.task, self.collate, self.training.precision)
        if found is None:
            raise Diverged("the head's logits are not finite")
        return found


def run_search(
    backbone: Backbone,
    task: PoolTask,
    search: Search,
    folder: Path,
    cache: CacheOptions | None,
    tell: Tell,
    progress: Progress = lambda doing, done, total: None,
) -> dict[str, Any]:
    """Do what is not done of a task's search in `folder`, write results.json there and return what is in it. MsltError
    where the folder holds another's, and where the whole model would be fine-tuned from what was fine-tuned on the task
    before, before anything is trained."""
    begins_from = search.full_from or backbone.source
    if "full" in search.methods and tuned_on(begins_from) == task.name:
        raise MsltError(
            f"{begins_from}: was fine-tuned on {task.name} already, on the rows that are set aside, too; name by "
            "--full-from the checkpoint that it came from, or search no full fine-tuning"
        )
    warnings = []
    if tuned_on(backbone.source) == task.name:
        warnings.append(
            f"{backbone.source} was fine-tuned on {task.name}, on the rows that are set aside, too: heads are chosen "
            "by scores that are too good; those reported are of rows it has not seen"
        )
        tell(f"warning: {warnings[0]}")
    rows, chosen = split_off(task.groups, search.choose_share, search.seed)
    bench = Bench(backbone, task, search, None, rows, chosen)
    for method in search.methods:
        if method != "full":
            refuse_unfit(settings_of(bench, method, ADAPTER_WIDTHS[0]), backbone.model.config.num_hidden_layers)
    same = {name: value for name, value in asdict(search).items() if name not in ("methods", "num_trials", "num_seeds")}
    settings = {
        **same, "full_from": digest(begins_from), "task": task.name,
        "backbone_sha256": backbone.described["backbone_sha256"], "tokenizer": backbone.described["tokenizer"],
        "max_tokens": task.num_tokens, "reading": task.reading, "data_sha256": task.digests(),
        "cache": None if cache is None else cache.dtype,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with lock_alone(folder / ".lock", f"{folder}: another process searches there; wait for it, or name another"):
        claim = folder / "search.json"
        if claim.exists():
            with refused_if_damaged(claim, f"move {folder} away: of what settings its trials are is lost"):
                before = dict(json.loads(claim.read_text())["settings"])
            refuse_other(claim, before, settings)
        else:
            write_json(claim, {"settings": settings, "provenance": provenance()})
        if cache is not None and any(method != "full" for method in search.methods):
            collate = backbone.collate(task, search.pad_states == "keep")
            first, last = states_of(search.layers, backbone.model.config.num_hidden_layers)
            states = range(first, last + 1)
            bench = replace(bench, cache=open_cache(backbone, task, collate, states, cache, progress))
        best = {method: run_trials(bench, method, folder, tell, progress) for method in search.methods}
        methods = {method: _finals(bench, method, each, folder, tell, progress) for method, each in best.items()}
        earlier = _earlier(folder / "results.json", search.num_trials, search.num_seeds)
        found = {
            "task": task.name, "metric": task.metric, "backbone": backbone.described["backbone"],
            "num_trials": search.num_trials, "optuna": optuna.__version__, "rows": len(rows), "chosen_on": len(chosen),
            "warnings": warnings, "methods": {**earlier, **methods}, "settings": settings, "provenance": provenance(),
        }  # fmt: skip
        write_json(folder / "results.json", found)
    return found


def _earlier(path: Path, num_trials: int, num_seeds: int) -> dict[str, Any]:
    """Methods of an earlier call with the same budget."""
    if not path.exists():
        return {}
    with refused_if_damaged(path, _MADE_ANEW):
        before = json.loads(path.read_text())
        if before["num_trials"] != num_trials:
            return {}
        return {name: each for name, each in before["methods"].items() if len(each["headlines"]) == num_seeds}


@dataclass(frozen=True)
class Found:
    """The best setting of a method's budget of trials, and its headline on the rows that were set aside."""

    setting: Setting
    chosen_at: float
    num_complete: int
    num_pruned: int


def run_trials(bench: Bench, method: str, folder: Path, tell: Tell, progress: Progress) -> Found:
    """Trials up to the budget, done before or now; of a larger one before, the first. A trial's sampler is keyed by its
    number and what was found before, so that a search that was stopped goes on as if it had not been."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    budget, seed = bench.search.num_trials, bench.search.seed
    journal = folder / f"{method}.journal"
    _end_with_a_line(journal)
    with refused_if_damaged(journal, _MADE_ANEW):
        storage = JournalStorage(JournalFileBackend(str(journal), _Held()))
        study = optuna.create_study(
            storage=storage, study_name=method, direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        )  # fmt: skip
    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # a killed process's
        study.tell(left.number, state=TrialState.FAIL)
    while (done := len(finished_trials(study))) < budget:
        progress(f"{bench.task.name}, {method}: trials", done, budget)
        study.sampler = optuna.samplers.TPESampler(seed=keyed.torch_seed(seed, f"search_{method}", done) % 2**32)
        trial = study.ask()
        try:
            value = _tried(bench, method, trial, keyed.torch_seed(seed, "trial", done) % 2**31)
            study.tell(trial, value if math.isfinite(value) else -1.0)  # below any metric
        except (optuna.TrialPruned, Diverged):
            study.tell(trial, state=TrialState.PRUNED)
    trials = finished_trials(study)[:budget]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        raise Diverged(f"{bench.task.name}, {method}: each of {budget} trials diverged; look at the data, or give "
                       "--precision fp32")  # fmt: skip
    best = max(complete, key=lambda trial: trial.value or 0.0)
    at = ", ".join(f"{name} {value:.4g}" for name, value in best.params.items())
    tell(f"{bench.task.name}, {method}: {budget} trials, best {best.value:.4f} at {at}")
    return Found(Setting(**best.params), best.value or 0.0, len(complete), len(trials) - len(complete))


class _Held:
    """The folder's lock is held already; optuna's own outlives a killed process, and the next waits for it forever."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _end_with_a_line(journal: Path) -> None:
    """Cut off what a killed process wrote of a line."""
    if journal.is_file() and not (written := journal.read_bytes()).endswith(b"\n"):
        with open(journal, "r+b") as file:
            file.truncate(written.rfind(b"\n") + 1)


def finished_trials(study: optuna.Study) -> list[Any]:
    """In their order, without those that a killed process left."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _tried(bench: Bench, method: str, trial: optuna.Trial, seed: int) -> float:
    """The headline on the rows that were set aside; `optuna.TrialPruned` where earlier trials were better so far."""
    trained = Trained(bench, method, asked(trial, method), seed, bench.rows)
    for step, done in enumerate(trained.looks(LOOKS)):
        if done < bench.search.num_epochs:
            trial.report(trained.chosen_headline(), step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return trained.chosen_headline()


def _final(path: Path) -> dict[str, Any]:
    with refused_if_damaged(path, _MADE_ANEW):
        found = json.loads(path.read_text())
        return {name: found[name] for name in ("setting", "seed", "scores", "headline", "seconds", "sizes")}


def _finals(bench: Bench, method: str, found: Found, folder: Path, tell: Tell, progress: Progress) -> dict[str, Any]:
    """The best setting on all training rows, seed by seed: other seeds than any trial's. Each is a file that is not
    made twice; heads are kept. A seed that diverges has no score; means are of the others."""
    task, search = bench.task, bench.search
    best = found.setting
    runs = []
    for index in range(search.num_seeds):
        seed = keyed.torch_seed(search.seed, "final", index) % 2**31
        path = folder / "finals" / f"{method}-{index}.json"
        before = _final(path) if path.is_file() else None
        if before is None or before["setting"] != asdict(best):
            path.parent.mkdir(parents=True, exist_ok=True)
            progress(f"{task.name}, {method}: seeds", index, search.num_seeds)
            began = time.perf_counter()
            trained = Trained(bench, method, best, seed, range(len(task.train)))
            for _ in trained.looks(1):
                pass
            seconds = time.perf_counter() - began
            try:
                scores = trained.scores()
            except Diverged:
                scores = None
            headline = None if scores is None else task.headline(scores)
            before = {"setting": asdict(best), "seed": seed, "scores": scores, "headline": headline,
                      "seconds": round(seconds, 2)}  # fmt: skip
            if method != "full":
                sizes = sizes_of(trained.head.settings, bench.backbone.model).as_plain()
                before["sizes"] = sizes
                if scores is not None:
                    save_head(
                        folder / "heads" / f"{method}-{index}", trained.head, bench.backbone.described, task=task.name,
                        labels=list(task.labels), max_tokens=task.num_tokens, metric=task.metric, scores=scores,
                        headline=headline, sizes=sizes, training=asdict(trained.training),
                        reading=task.reading,
                    )  # fmt: skip
            else:
                size = sum(parameter.numel() for parameter in trained.whole.parameters())
                before["sizes"] = {"head": size, "whole": size, "deployed": size, "ratio": 1.0, "task_bytes": 4 * size}
            write_json(path, before)
        runs.append(before)
    headlines = [run["headline"] for run in runs]
    scored = [each for each in headlines if each is not None]
    mean = statistics.fmean(scored) if scored else None
    deviation = statistics.stdev(scored) if len(scored) > 1 else None
    said = "no score" if mean is None else f"{100 * mean:.2f}"
    lost = f", {len(runs) - len(scored)} more diverged" if len(scored) < len(runs) else ""
    tell(f"{task.name}, {method}: {said} over {len(scored)} seeds{lost}")
    return {
        "best": asdict(best),
        "chosen_at": found.chosen_at,
        "trials": {"complete": found.num_complete, "pruned": found.num_pruned},
        "headlines": headlines, "mean": mean, "deviation": deviation,
        "scores": [run["scores"] for run in runs], "sizes": runs[0]["sizes"],
        "train_s": [run["seconds"] for run in runs],
    }  # fmt: skip
