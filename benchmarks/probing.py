"""What does probing all layers cost beside one forward pass, and all probes at once beside one after the other? A
record.

python -m benchmarks.probing CKPT --data-dir PROBING --task BigramShift --turns 5 --record FILE

Sentences go through the plain model of transformers, of whose last hidden state the first token is kept, and through it
once with every hidden state pooled and written;
both tokenize, in the same batches, in alternate turns. Then a search (four strengths of L2) of every hidden state: all
at once; one hidden state at a time by the same code; and one probe at a time in a loop like SentEval's own (a module,
torch's Adam, early stop), which is not asked to train the best once more, as SentEval does.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate.device import open_device
from mslt.evaluate.opening import locate, open_model, open_tokenizer
from mslt.evaluate.probe_features import BATCH_SIZE, open_features, standardized, write_features
from mslt.evaluate.probe_tasks import TASKS, ProbeRows, read_rows
from mslt.heads.layer_probe import Features, ProbeTraining, initial_weights, train_probes
from mslt.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", default="BigramShift")
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-epochs", type=int, default=ProbeTraining.max_epochs)
    parser.add_argument("--turns", type=int, default=5, help="of extraction")
    parser.add_argument("--probe-turns", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    device = open_device(arguments.device)
    source, _ = locate(arguments.checkpoint)
    model, _ = open_model(source, AutoModel)
    model.pooler = None  # hidden states are asked for alone, from either way
    model.to(device)
    rows = read_rows(arguments.data_dir / TASKS[arguments.task].file, arguments.max_train_rows)
    training = replace(ProbeTraining(TASKS[arguments.task].num_hidden), max_epochs=arguments.max_epochs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        passes = extraction_times(model, open_tokenizer(source), rows.texts, path, arguments)
        features = standardized(open_features(path), rows.splits["tr"])
        probes = probe_times(features, rows, training, device, arguments.probe_turns)
        size_mb = path.stat().st_size / 1e6
    num_states = len(features.shift_LD)
    lines = [
        *heading("Probing all layers", this_command(), provenance(), hardware()),
        f"{arguments.task}: {len(rows.texts):,} sentences, {num_states} hidden states × {features.shift_LD.shape[1]}, "
        f"{size_mb:.0f} MB in fp16, on {device}, {torch.get_num_threads()} threads. Medians, least and most of turns "
        "in alternation.",
        "",
        *table(["sentences through the encoder", "s", "beside the plain pass"], relative(passes)),
        "",
        *table([f"{num_states} × {len(training.l2)} probes", "s", "beside all at once"], relative(probes)),
    ]  # fmt: skip
    write_record(arguments.record, lines)


def relative(times: dict[str, list[float]]) -> list[list[str]]:
    """Each beside the first."""
    first = statistics.median(next(iter(times.values())))
    return [
        [name, f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})",
         f"{statistics.median(each) / first:.2f}×"]
        for name, each in times.items()
    ]  # fmt: skip


def timed(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def extraction_times(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    path: Path,
    arguments: argparse.Namespace,
) -> dict[str, list[float]]:
    ways: dict[str, Callable[[], object]] = {"plain forward pass": lambda: plain(model, tokenizer, texts, arguments)}
    for pooling in ("mean", "cls"):
        ways[f"all hidden states pooled ({pooling}) and written"] = lambda pooling=pooling: write_features(
            model, tokenizer, texts, path, pooling, arguments.max_tokens, lambda done, total: None
        )
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns + 1):
        for name, way in ways.items():
            took = timed(way, model.device)
            if turn:  # the first warms up
                times[name].append(took)
    return times


@torch.inference_mode()
def plain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], arguments: argparse.Namespace
) -> None:
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for first in range(0, len(texts), BATCH_SIZE):
        chosen = [texts[index] for index in order[first : first + BATCH_SIZE]]
        given = tokenizer(
            chosen, truncation=True, max_length=arguments.max_tokens, padding="longest", return_tensors="pt"
        )
        model(**{name: tensor.to(model.device) for name, tensor in given.items()}).last_hidden_state[:, 0].cpu()


def probe_times(
    features: Features, rows: ProbeRows, training: ProbeTraining, device: torch.device, turns: int
) -> dict[str, list[float]]:
    labels_R, num_classes = torch.from_numpy(rows.labels), len(rows.classes)

    def by_layer() -> None:
        for k in range(len(features.shift_LD)):
            one = Features(
                features.rows_RLD[:, k : k + 1], features.scale_LD[k : k + 1], features.shift_LD[k : k + 1]
            )  # fmt: skip
            train_probes(one, labels_R[None], rows.splits, num_classes, training, 0, device=device)

    def by_probe() -> None:
        for k in range(len(features.shift_LD)):
            x_RD = torch.addcmul(features.shift_LD[k], features.rows_RLD[:, k].float(), features.scale_LD[k]).to(device)
            for l2 in training.l2:
                one_alone(x_RD, labels_R.to(device), rows.splits, num_classes, training, l2)

    def together() -> None:
        train_probes(features, labels_R[None], rows.splits, num_classes, training, 0, device=device)

    ways = {"all at once": together, "a hidden state after the other": by_layer, "a probe after the other": by_probe}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            times[name].append(timed(way, device))
    return times


def one_alone(
    x_RD: torch.Tensor,
    labels_R: torch.Tensor,
    splits: dict[str, np.ndarray],
    num_classes: int,
    training: ProbeTraining,
    l2: float,
    seed: int = 0,
) -> tuple[float, torch.Tensor, int]:
    """As SentEval's classifier.py trains a probe: of the module that was best on dev its accuracy there and which test
    rows it has right [R], and the epochs until it ended."""
    width, hidden = x_RD.shape[1], training.num_hidden
    parts: list[nn.Module] = [nn.Linear(width, hidden or num_classes)]
    if hidden:
        parts += [nn.Sigmoid(), nn.Linear(hidden, num_classes)]
    model = nn.Sequential(*parts)
    begin = initial_weights(width, num_classes, hidden, seed)
    for parameter, weight in zip(model.parameters(), begin, strict=True):
        parameter.data.copy_(weight)
    model.to(x_RD.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, weight_decay=l2)

    @torch.no_grad()
    def right(model: nn.Module, split: str) -> torch.Tensor:
        chosen = torch.from_numpy(splits[split]).to(x_RD.device)
        return model(x_RD[chosen]).argmax(1) == labels_R[chosen]

    best, best_model, misses, epoch, is_over = -1.0, model, 0, 0, False
    while not is_over and epoch <= training.max_epochs:
        for _ in range(training.round_epochs):
            epoch += 1
            order = np.argsort(keyed.bits(seed, "probe_order", epoch, splits["tr"]), kind="stable")
            ordered = torch.from_numpy(splits["tr"][order]).to(x_RD.device)
            for chosen in ordered.split(training.batch_size):
                loss = cross_entropy(model(x_RD[chosen]), labels_R[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        found = float(right(model, "va").float().mean())
        if found > best:
            best, best_model = found, copy.deepcopy(model)
        else:
            is_over = misses >= training.tenacity
            misses += 1
    return best, right(best_model, "te"), epoch


if __name__ == "__main__":
    try:
        main()
    except MsltError as error:
        raise SystemExit(f"probing: {error}") from None
