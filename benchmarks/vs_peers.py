"""How fast is the engine beside the same work in plain Hugging Face and torch DDP?

    python -m benchmarks.vs_peers [--layers 12 --width 256 --vocabulary 8192 --sequence-length 128 --batch 16]
                                  [--workers N] [--rounds 5] [--steps 1] [--dtype fp32|bf16] [--no-compile]
                                  [--record FILE]

Contestants share the processes and take turns, round after round, so that whatever else the machine does hits all
alike. All have the same weights at the start, batch, precision (autocast on fp32 weights; gradients reduced in fp32),
probability of dropout, clipping at 1.0 and our LAMB, so that what differs is forward, backward and reduction (on a CPU
mslt's dropout and attention are its own). Peers are
`BertForPreTraining` with SDPA under DistributedDataParallel, which reduces beside the backward pass: default buckets,
gradients as views of them, no broadcast of constant buffers, `static_graph` when eager. Before that mslt's loss is
held against theirs; exit status 1 where they differ by more than 1e-4.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForPreTraining
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from benchmarks.memory import SCHEDULES, Size, add_size_options, loss_of, plan_of, size_of
from benchmarks.record import hardware, heading, shape, table, this_command, write_record
from benchmarks.workers import spawn
from mslt.data.loader import Batch
from mslt.data.masking import IGNORED_LABEL
from mslt.engine.ds_config import autocast_dtype
from mslt.engine.engine import Engine, Workers
from mslt.engine.optimizer import Lamb
from mslt.engine.pieces import whole_pieces
from mslt.models import factory
from mslt.models.compiling import why_no_compiler
from mslt.plan import Plan
from mslt.provenance import provenance
from mslt.train import build_module

LARGEST_DIFFERENCE = 1e-4  # nats
RATE = 1e-4
FROZEN_STAGE = 2  # index: the third of four growing stages
STEPS = {"a full step": ("full", 0), "stage 3 of k=4": ("mslt", FROZEN_STAGE)}  # schedule, stage index
ENGINE, ALL_POSITIONS, MASKED = "mslt, full stage", "Hugging Face + DDP", "the same, head on masked positions"
COMPILED, MASKED_COMPILED = f"{ALL_POSITIONS}, compiled", "head on masked positions, compiled"
FROZEN = "mslt, stage 3 of k=4"
ENGINE_COMPILED, FROZEN_COMPILED = f"{ENGINE}, compiled", f"{FROZEN}, compiled"
Step = Callable[[], None]


@dataclass(frozen=True)
class Turn:
    """Seconds a step: on the clock, of the slowest worker, and of processor time, the mean of all workers. The second
    is hardly disturbed by others on the machine, and shows no waiting."""

    wall_s: float
    processor_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, batch=16)
    parser.add_argument("--workers", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="that a contestant takes at its turn")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled contestants out")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.batch % options.workers:
        parser.error(f"--batch {options.batch}: not a multiple of the {options.workers} workers")
    engine, size = f"zero0_{options.dtype}", size_of(options)
    plans = tuple(plan_of(size, SCHEDULES[name], engine, communication="fp32") for name in ("full", "mslt"))
    measured = spawn(work, options.workers, plans, options)
    head = heading("The same work in plain Hugging Face and torch DDP", this_command(), provenance(), hardware())
    agree = all(difference <= LARGEST_DIFFERENCE for difference in measured["differences"].values())  # NaN is no
    write_record(options.record, [*head, *report(measured, plans[0], options, agree)])
    sys.exit(0 if agree else 1)


def work(workers: Workers, plans: tuple[Plan, Plan], options: argparse.Namespace) -> dict[str, Any]:
    """One worker; returns what was measured."""
    warnings.filterwarnings("ignore", "`broadcast_buffers` is", FutureWarning)  # torch 2.12 has nothing else
    full, growing = plans
    batch = made_share(size_of(options), workers)
    everywhere = with_labels_everywhere(batch)
    differences = loss_differences(full, batch, workers)
    why_not = "left out by --no-compile" if options.no_compile else no_compiler(workers)

    engines = {ENGINE: started(full, 0, workers), FROZEN: started(growing, FROZEN_STAGE, workers)}
    if why_not is None:
        compiled_full, compiled_growing = (plan.model_copy(update={"compile": "all"}) for plan in plans)
        engines[ENGINE_COMPILED] = started(compiled_full, 0, workers)
        engines[FROZEN_COMPILED] = started(compiled_growing, FROZEN_STAGE, workers)
    contestants: dict[str, Step] = {
        ALL_POSITIONS: peer_step(hugging_face(full), everywhere, full, workers),
        MASKED: peer_step(MaskedPositions(hugging_face(full)), batch, full, workers),
    }
    if why_not is None:
        contestants |= {
            COMPILED: peer_step(hugging_face(full), everywhere, full, workers, compiled=True),
            MASKED_COMPILED: peer_step(MaskedPositions(hugging_face(full)), batch, full, workers, compiled=True),
        }
    contestants |= {name: engine_step(engine, batch) for name, engine in engines.items()}

    first = {name: measure(step, 1, workers).wall_s for name, step in contestants.items()}
    for step in contestants.values():
        measure(step, 2, workers)  # DDP orders its buckets anew after the first step
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, step in contestants.items():
            turns[name].append(measure(step, options.steps, workers))
    for engine in engines.values():
        engine.close()
    told = {name: [asdict(turn) for turn in taken] for name, taken in turns.items()}
    return {"differences": differences, "why_not_compiled": why_not, "first": first, "turns": told}


def made_share(size: Size, workers: Workers) -> Batch:
    """This rank's part of a made-up batch. Every prediction has a position of its own; one sample in eight is half as
    long as the others, as real batches are padded."""
    share, T = size.batch // workers.size, size.sequence_length
    generator = torch.Generator().manual_seed(workers.rank)
    length_B1 = torch.full((share, 1), T)
    length_B1[::8] = max(T // 2, size.predictions)
    is_text_BT = torch.arange(T) < length_B1
    order_BT = torch.rand(share, T, generator=generator).masked_fill(~is_text_BT, 2.0).argsort(1)
    return {
        "input_ids": torch.randint(1, size.vocabulary, (share, T), generator=generator) * is_text_BT,
        "token_type_ids": ((torch.arange(T) >= length_B1 // 2) & is_text_BT).long(),
        "attention_mask": is_text_BT.long(),
        "mlm_positions": order_BT[:, : size.predictions].sort(1).values,
        "mlm_labels": torch.randint(size.vocabulary, (share, size.predictions), generator=generator),
        "nsp_labels": torch.randint(2, (share,), generator=generator),
    }


def with_labels_everywhere(batch: Batch) -> Batch:
    """The batch as Hugging Face takes it: labels at every position, IGNORED_LABEL where nothing is predicted."""
    nowhere_BT = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    return {
        **{name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")},
        "labels": nowhere_BT.scatter(1, batch["mlm_positions"], batch["mlm_labels"]),
        "next_sentence_label": batch["nsp_labels"],
    }


class MaskedPositions(nn.Module):
    """Hugging Face's model with its head on the masked positions alone: what a careful user writes without mslt."""

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mlm_positions: torch.Tensor,
        mlm_labels: torch.Tensor,
        nsp_labels: torch.Tensor,
    ) -> BertForPreTrainingOutput:
        """ids, types and mask [B, T]; positions and labels [B, M]; NSP labels [B]. Both losses are means."""
        h_BTD, pooled_BD = self.model.bert(input_ids, attention_mask, token_type_ids, return_dict=False)
        h_BMD = h_BTD.gather(1, mlm_positions[:, :, None].expand(-1, -1, h_BTD.shape[-1]))
        mlm_logits_BMV, nsp_logits_B2 = self.model.cls(h_BMD, pooled_BD)
        mlm_loss = cross_entropy(mlm_logits_BMV.flatten(0, 1), mlm_labels.flatten())
        return BertForPreTrainingOutput(loss=mlm_loss + cross_entropy(nsp_logits_B2, nsp_labels))


def hugging_face(plan: Plan) -> BertForPreTraining:
    """The plain model, with the weights that all contestants of this depth start from."""
    depth = plan.model.num_hidden_layers
    model = factory.build(plan.model, depth, factory.initial_state(plan.model, depth, seed=0))
    assert isinstance(model, BertForPreTraining)
    assert model.config._attn_implementation == "sdpa"
    return model


@torch.no_grad()
def loss_differences(plan: Plan, batch: Batch, workers: Workers) -> dict[str, float]:
    """How far mslt's loss is from each peer's: fp32, dropout off, same weights and batch. The largest of all ranks."""
    model = hugging_face(plan).to(workers.device).eval()
    batch = to_device(batch, workers.device)
    own = build_module(plan, 0, factory.own_state(model))
    own.autocast = None
    ours = loss_of(own.to(workers.device).eval(), batch)
    theirs = {ALL_POSITIONS: model(**with_labels_everywhere(batch)), MASKED: MaskedPositions(model).eval()(**batch)}
    found = workers.gather({name: abs(output.loss - ours).item() for name, output in theirs.items()})
    return {name: torch.tensor([by_rank[name] for by_rank in found]).max().item() for name in theirs}  # NaN stays


def no_compiler(workers: Workers) -> str | None:
    """Why torch.compile does not work here, None where it does; the same on all ranks."""
    reasons = workers.gather(why_no_compiler(workers.device.type))
    return next((f"torch.compile does not work here: {why}" for why in reasons if why is not None), None)


def started(plan: Plan, stage_index: int, workers: Workers) -> Engine:
    base = factory.initial_state(plan.model, plan.stages[stage_index].depth, seed=0)
    return Engine(build_module(plan, stage_index, base), plan, stage_index, workers)


def engine_step(engine: Engine, batch: Batch) -> Step:
    def step() -> None:
        engine.train_step(batch, 0, RATE)

    return step


def peer_step(module: nn.Module, batch: Batch, plan: Plan, workers: Workers, compiled: bool = False) -> Step:
    """A step of a peer; its forward pass returns an output with a `loss`."""
    is_low = autocast_dtype(plan.engine) is not None
    module = module.to(workers.device).train()
    parameters = dict(module.named_parameters())
    optimizer = Lamb(parameters.values(), plan.optimizer, plan.clip_norm)
    matrices = [name for name, parameter in parameters.items() if parameter.ndim > 1]
    optimizer.bind(whole_pieces(parameters), matrices, workers.device)
    optimizer.param_groups[0]["lr"] = RATE
    distributed: Any = DistributedDataParallel(
        module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=not compiled
    )
    if compiled:
        distributed = torch.compile(distributed, dynamic=False)

    def step() -> None:
        on_device = to_device(batch, workers.device)
        with torch.autocast(workers.device.type, dtype=torch.bfloat16, enabled=is_low):
            loss = distributed(**on_device).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def measure(step: Step, times: int, workers: Workers) -> Turn:
    workers.barrier()
    synchronize(workers.device)
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(times):
        step()
    synchronize(workers.device)
    spent = workers.gather((time.perf_counter() - began, time.process_time() - processor))
    wall, processor_times = zip(*spent, strict=True)
    return Turn(max(wall) / times, statistics.mean(processor_times) / times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(measured: dict[str, Any], plan: Plan, options: argparse.Namespace, agree: bool) -> list[str]:
    """The record below its heading. A ratio is the median over rounds of that of the two turns of a round."""
    turns = {name: [Turn(**turn) for turn in told] for name, told in measured["turns"].items()}
    rows = []
    for name in (
        ALL_POSITIONS, MASKED, COMPILED, MASKED_COMPILED, ENGINE, ENGINE_COMPILED, FROZEN, FROZEN_COMPILED
    ):  # fmt: skip
        if name not in turns:
            rows.append([name, *["skipped"] * 7])
            continue
        ratios = [
            statistics.median(theirs.wall_s / own.wall_s for own, theirs in zip(turns[name], turns[peer], strict=True))
            for peer in (ALL_POSITIONS, MASKED)
        ]
        wall = [turn.wall_s for turn in turns[name]]
        processor = statistics.median(turn.processor_s for turn in turns[name])
        rows.append([
            name, f"{options.batch / statistics.median(wall):.1f}", f"{1000 * statistics.median(wall):.1f}",
            f"{1000 * min(wall):.1f} to {1000 * max(wall):.1f}", f"{1000 * processor:.1f}",
            f"{measured['first'][name]:.1f}", *(f"{ratio:.2f}" for ratio in ratios),
        ])  # fmt: skip
    columns = [
        "", "samples/s, median", "a step, ms", "lowest to highest", "processor time of a worker, ms", "first step, s",
        f"samples/s over {ALL_POSITIONS}", f"over {MASKED}",
    ]  # fmt: skip
    reason = measured["why_not_compiled"]
    differences = ", ".join(f"{value:.1e} ({name})" for name, value in measured["differences"].items())
    return [
        f"{shape(plan, options.workers)} Gradients are reduced in fp32. Rounds: {options.rounds}, steps in a turn: "
        f"{options.steps}.",
        "",
        f"mslt's loss differs by {differences}; allowed are {LARGEST_DIFFERENCE:g}: {'held' if agree else 'MISSED'}.",
        "",
        *table(columns, rows),
        *([] if reason is None else ["", f"Compiled contestants were skipped: {reason}."]),
    ]


if __name__ == "__main__":
    main()
