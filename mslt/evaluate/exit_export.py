"""Exits as a chain of graphs, one for each layer, that run without this library: the caller goes on to the next while
a row is not sure.

`exit-00` takes input_ids, attention_mask and, where the model has types, token_type_ids; the others hidden [A, T, D]
and attention_mask [A, T]. Each gives next_hidden [A, T, D] and logits [A, C]; whoever calls leaves rows that are done
out of what the next is given. `exits.json` says what belongs to them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mslt.errors import MsltError
from mslt.files import whole_folder, write_json
from mslt.heads.early_exit import EarlyExitModel
from mslt.heads.exit_rule import ExitRule, begun, entropy, leaves
from mslt.heads.off_ramp import pool
from mslt.models import families
from mslt.models.layer_stack import iter_hidden, iter_layers
from mslt.provenance import provenance

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

MOST_DIFFERENCE = 1e-5  # of logits, times their largest or 1
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of the first graph, in this order
Batch = dict[str, torch.Tensor]
Run = Callable[[int, Sequence[np.ndarray]], Sequence[np.ndarray]]


class Link(nn.Module):
    """Layer k with its exit; the first with the embeddings."""

    def __init__(self, exits: EarlyExitModel, k: int) -> None:
        super().__init__()
        self.exits = exits
        self.k = k

    def forward(
        self, first: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`first` is ids [A, T] or hidden state k [A, T, D]; hidden state k + 1, and logits [A, C]."""
        if self.k:
            _, h_ATD = next(iter_layers(self.exits.model, first, attention_mask, self.k))
        else:
            hidden = iter_hidden(self.exits.model, first, token_type_ids, attention_mask)
            next(hidden)
            _, h_ATD = next(hidden)
        last = self.k == self.exits.num_exits - 1
        read = h_ATD if last else pool(h_ATD, attention_mask, self.exits.options.pooling)
        return h_ATD, self.exits.exit_heads[self.k](read)


def export(exits: EarlyExitModel, rule: ExitRule, sample: Batch, out: Path, kind: str, labels: Sequence[str]) -> float:
    """Write the chain for `kind`, onnx or torch, into the folder `out`, run it once on the sample, and return by how
    much its logits differ from ours. MsltError where it differs, or what is needed is not installed."""
    if out.exists():
        raise MsltError(f"{out}: exists; name a folder that does not")
    if kind == "onnx" and onnxruntime is None:
        raise MsltError("onnx: onnxruntime is not installed, which runs what is written; "
                        "`pip install onnx onnxscript onnxruntime`, or take --format torch")  # fmt: skip
    exits = exits.eval().to("cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in INPUTS if name in sample]
    with whole_folder(out) as folder, torch.no_grad():
        arguments = tuple(sample[name] for name in names)
        for k in range(exits.num_exits):
            link = Link(exits, k).eval()
            _write(link, arguments, folder / name_of(k, kind), kind)
            arguments = (link(*arguments)[0], sample["attention_mask"])
        description = {
            "format": kind,
            "graphs": [name_of(k, kind) for k in range(exits.num_exits)],
            "inputs": names,
            "labels": list(labels),
            "thresholds": list(rule.thresholds),
            "patience": rule.patience,
            "tolerance": rule.tolerance,
            "provenance": provenance(),
        }
        write_json(folder / "exits.json", description)
        return _compare(exits, rule, sample, runner(folder, kind))


def name_of(k: int, kind: str) -> str:
    return f"exit-{k:02d}.{'onnx' if kind == 'onnx' else 'pt2'}"


def _write(link: Link, arguments: tuple[torch.Tensor, ...], path: Path, kind: str) -> None:
    most = families.num_positions(link.exits.model.config)
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=2, max=most)
    shapes = tuple({0: rows, 1: tokens} for _ in arguments)
    names = ["first", *INPUTS[1:]][: len(arguments)]
    with torch.random.fork_rng(devices=[]):
        program = torch.export.export(link, arguments, dynamic_shapes=dict(zip(names, shapes, strict=True)))
        if kind == "torch":
            torch.export.save(program, path)
            return
        torch.onnx.export(
            program, (), str(path), dynamo=True, external_data=False, verbose=False,
            input_names=[("hidden" if link.k else INPUTS[0]), *names[1:]], output_names=["next_hidden", "logits"],
        )  # fmt: skip


def runner(folder: Path, kind: str) -> Run:
    """What runs graph k of a folder on arrays."""
    if kind == "onnx":
        sessions: list[Any] = [
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in sorted(folder.glob("exit-*.onnx"))
        ]

        def run(k: int, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
            names = [each.name for each in sessions[k].get_inputs()]
            return sessions[k].run(None, dict(zip(names, arrays, strict=True)))

        return run
    programs = [torch.export.load(path).module() for path in sorted(folder.glob("exit-*.pt2"))]

    def run_torch(k: int, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in programs[k](*(torch.from_numpy(array) for array in arrays))]

    return run_torch


def run_chain(run: Run, num_exits: int, rule: ExitRule, sample: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, C] and exits [B] of a chain, rows that are done left out."""
    arrays = [sample[name].numpy() for name in INPUTS if name in sample]
    mask = arrays[1]
    rows, kept = np.arange(len(mask)), begun(len(mask))
    answers: dict[int, tuple[np.ndarray, int]] = {}
    for k in range(num_exits):
        hidden, logits = run(k, arrays)
        read = torch.from_numpy(logits)
        done, kept = (
            leaves(rule, k, read, entropy(read), kept) if k < num_exits - 1 else (torch.ones(len(rows)) > 0, kept)
        )
        answers |= {int(row): (logits[place], k) for place, row in enumerate(rows) if done[place]}
        stay = (~done).numpy()
        if not stay.any():
            break
        rows, mask, kept = rows[stay], mask[stay], kept[torch.from_numpy(stay)]
        arrays = [hidden[stay], mask]
    ordered = [answers[row] for row in range(len(answers))]
    return np.stack([logits for logits, _ in ordered]), np.array([k for _, k in ordered])


def _compare(exits: EarlyExitModel, rule: ExitRule, sample: Batch, run: Run) -> float:
    """Every exit without leaving, then the rule: logits within MOST_DIFFERENCE, the same exits."""
    expected = exits.all_logits(**sample).numpy()
    arrays = [sample[name].numpy() for name in INPUTS if name in sample]
    worst = 0.0
    for k in range(exits.num_exits):
        hidden, logits = run(k, arrays)
        worst = max(worst, float(np.abs(logits - expected[k]).max() / max(1.0, np.abs(expected[k]).max())))
        arrays = [hidden, sample["attention_mask"].numpy()]
    ours = exits(**sample, rule=rule)
    _, at = run_chain(run, exits.num_exits, rule, sample)
    if worst > MOST_DIFFERENCE or not np.array_equal(at, ours.exit_layer.numpy()):
        raise MsltError(f"export: what was written differs from the model by {worst:.2g} (at most {MOST_DIFFERENCE:g} "
                        "is rounding), or leaves elsewhere; keep to --format torch, or to mslt itself")  # fmt: skip
    return worst
