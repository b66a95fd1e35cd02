"""The only door to DeepSpeed: workers, and an engine that trains one stage."""

import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from mslt.data import keyed
from mslt.data.loader import Batch
from mslt.engine.clock import Clock
from mslt.engine.ds_config import bucket_elements, complete, reduced_bytes, reduced_dtype, zero_stage
from mslt.engine.optimizer import Lamb, LossScale, refuse_unequal_apex
from mslt.engine.pieces import whole_pieces, zero_pieces
from mslt.engine.reduction import Reducer, Work
from mslt.errors import MsltError
from mslt.models.compiling import compile_layers
from mslt.models.families import FAMILIES, slot_of
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.freezing import hold_in
from mslt.models.surgery import State
from mslt.plan import Plan, autocast_dtype, micro_batch_size

_MLM_LOSS, _MLM_COUNT = SUMS.index("mlm_loss"), SUMS.index("mlm_count")
_NSP_LOSS = SUMS.index("nsp_loss")


@dataclass(frozen=True)
class Workers:
    """This process among those that train together. `handed_bytes` counts what each collective of training is handed:
    by DeepSpeed, and by `start_sum`."""

    rank: int
    size: int
    device: torch.device
    handed_bytes: Counter[str] = field(default_factory=Counter)

    def barrier(self) -> None:
        torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain data) on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (plain data) on every rank."""
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        torch.distributed.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: torch.Tensor) -> Work:
        """Begin to add up over all ranks, in place; `wait` for what this returns."""
        self.handed_bytes["all_reduce"] += tensor.numel() * tensor.element_size()
        work = torch.distributed.all_reduce(tensor, async_op=True)
        assert work is not None
        return work


def start_workers(timeout_s: float = 1800) -> Workers:
    """Join the other processes of this launch. RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* come from the launcher."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.getenv(name)]
    if missing:
        raise MsltError(f"{', '.join(missing)}: not set; start this through `mslt train` or the deepspeed launcher")
    # DeepSpeed would compile a shared-memory operator here. It serves inference_all_reduce alone, which training
    # never calls, so nothing is lost without it and no compiler is needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    device = torch.device(accelerator.current_device_name())
    workers = Workers(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
    _count_bytes(workers.handed_bytes)
    return workers


# The collectives of DeepSpeed's training, and which of their tensors is the whole: a gather's output, else the input.
_COLLECTIVES = {"all_reduce": 0, "reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}


def _count_bytes(handed: Counter[str]) -> None:
    """Count the bytes of what DeepSpeed hands to its communication backend, by collective, from now on."""

    def counted(name: str, whole: int, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            given = [*tensors, *options.values()]
            handed[name] += given[whole].numel() * given[whole].element_size()
            return collective(*tensors, **options)

        return call

    backend = deepspeed.comm.comm.cdb
    for name, whole in _COLLECTIVES.items():
        setattr(backend, name, counted(name, whole, getattr(backend, name)))


@dataclass(frozen=True)
class Ahead:
    """The frozen part of a step's first micro-batch, [B, T, D], and where it left the generator."""

    step: int
    prefix_BTD: torch.Tensor | None
    generator: torch.Tensor


class Engine:
    """One stage's model, optimizer and DeepSpeed engine. Made fresh for every stage, never edited."""

    def __init__(self, module: PretrainingLoss, plan: Plan, stage_index: int, workers: Workers) -> None:
        """`module` is frozen as the stage says, and computes in the precision of `plan.engine`."""
        self.stage = plan.stages[stage_index]
        self.first_step = plan.first_step(stage_index)
        self.zero_stage = zero_stage(plan.engine)
        self.workers = workers
        self.micro_batch_size = micro_batch_size(self.stage, workers.size)
        self.clock = Clock(workers.device)
        self.handed_bytes: Counter[str] = Counter()  # what DeepSpeed handed to collectives in steps, by collective
        self.left_out_steps = 0
        self._bytes_are_checked = False
        self._trainable = {n: p for n, p in module.model.named_parameters() if p.requires_grad}
        self.sizes = {name: parameter.numel() for name, parameter in self._trainable.items()}
        matrices = [name for name, parameter in self._trainable.items() if parameter.ndim > 1]
        self._scale = LossScale() if autocast_dtype(plan.engine) == "float16" else None
        if plan.optimizer.implementation == "apex":
            refuse_unequal_apex(plan.optimizer, workers.device)
        self._optimizer = Lamb(
            self._trainable.values(), plan.optimizer, plan.clip_norm, self._scale, plan.skip_bad_batches > 0
        )
        self._config = complete(plan.engine, self.stage, workers.size)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=self._config, dist_init_required=False
        )
        # Without ZeRO we reduce, once a step; with it, DeepSpeed reduces in the backward pass.
        self._engine.enable_backward_allreduce = self.zero_stage > 0
        self._reducer = None
        if self.zero_stage == 0 and workers.size > 1:
            self._reducer = Reducer(
                self._trainable.values(),
                getattr(torch, reduced_dtype(plan.engine)),
                bucket_elements(plan.engine),
                workers.size,
                workers.start_sum,
            )
        if module.autocast is not None and self.zero_stage < 3:
            hold_in(module.model, self.stage.frozen, module.autocast)
        if plan.compile != "none":
            everything = (*self.stage.frozen, *self.stage.trainable)
            compile_layers(module.model, everything if plan.compile == "all" else self.stage.frozen)
        # ZeRO-3 gathers weights where its engine's forward pass comes to them, and nowhere else.
        self._has_prefix = module.lowest_graph_layer >= 0 and self.zero_stage < 3
        self._ahead: Ahead | None = None
        if self.zero_stage:
            pieces, sum_over_ranks = zero_pieces(self._zero, self._trainable, workers.rank), workers.sum
        else:
            pieces, sum_over_ranks = whole_pieces(self._trainable), None
        self._optimizer.bind(pieces, matrices, workers.device, sum_over_ranks)
        self._refuse_another_trainable_set(plan)
        self._stop = torch.zeros((), dtype=torch.long, pin_memory=workers.device.type == "cuda")
        self._stop_is_here: torch.cuda.Event | None = None
        self._engine.train()  # not said by deepspeed.initialize; puts the slots that stay still into evaluation mode

    def train_step(
        self, batch: Batch, step: int, rate: float, stop: bool = False, upcoming: Batch | None = None
    ) -> torch.Tensor:
        """One optimizer step of the stage over this rank's share of the batch. Returns this rank's SUMS, [6].

        The gradient is that of (sum of MLM losses) / (masked positions of the global batch) + (sum of NSP losses) /
        (samples of the global batch): neither world size nor accumulation changes it. Without next-sentence prediction
        the second part is 0. `stop` tells all ranks that this one wants to leave (see `someone_wants_to_stop`).
        `upcoming` is the share of step + 1, if that follows: what is frozen begins on it while gradients travel.
        """
        self._optimizer.param_groups[0]["lr"] = rate
        batch = self._to_device(batch)
        with self.clock.span("reduce"):
            masked = (batch["mlm_labels"] >= 0).sum()
            counts = self.workers.sum(torch.stack([masked, torch.full_like(masked, int(stop))]))
            self._remember_stop(counts[1])
        # Reducing averages gradients over the workers; times their number makes that a sum. One masked position at
        # least: whole words that are all over the budget leave nothing to predict.
        mlm_weight = self.workers.size / counts[0].clamp(min=1)
        nsp_weight = self.workers.size / self.stage.batch_size
        before = self.workers.handed_bytes.copy()
        total = torch.zeros(len(SUMS), device=self.workers.device)
        micro_batches = self._micro_batches(batch)
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            with self.clock.span("forward"):
                prefix_BTD = self._begin(micro_batch, step, index)
                sums = self._engine(**micro_batch, prefix_BTD=prefix_BTD)
                loss = sums[_MLM_LOSS] * mlm_weight + sums[_NSP_LOSS] * nsp_weight
            if is_last and self._reducer is not None:
                self._reducer.begin()
            with self.clock.span("backward"):
                self._engine.backward(loss if self._scale is None else loss * self._scale.value, scale_wrt_gas=False)
            total += sums.detach()
        if upcoming is not None and self._has_prefix:
            with self.clock.span("forward"):
                first = self._to_device(self._micro_batches(upcoming)[0])
                self._ahead = Ahead(step + 1, self._begin(first, step + 1, 0), get_accelerator().get_rng_state())
        if self._reducer is not None:
            with self.clock.span("reduce"):
                self._reducer.finish()
        with self.clock.span("optimizer"):
            self._optimizer.begin_step()
            self._engine.step()
        if self._scale is not None:
            self._scale.update(finite=self._optimizer.applied)
        elif not self._optimizer.applied:
            self.left_out_steps += 1
        if not self._optimizer.applied:
            total *= total.isfinite().all()
            total.nan_to_num_(0.0, 0.0, 0.0)  # a batch that taught nothing must not spoil the mean
        handed = self.workers.handed_bytes - before
        if not self._bytes_are_checked:
            self._refuse_other_bytes(handed, len(micro_batches))
            self._bytes_are_checked = True
        self.handed_bytes += handed
        return total

    def _begin(self, micro_batch: Batch, step: int, index: int) -> torch.Tensor | None:
        """Put the generator where the micro-batch's dropout begins, and compute what lies below the boundary, if
        anything does: [B, T, D]. What was computed ahead is taken from there, and the generator goes on from it."""
        if self._ahead is not None and (step, index) == (self._ahead.step, 0):
            ahead, self._ahead = self._ahead, None
            get_accelerator().set_rng_state(ahead.generator)
            return ahead.prefix_BTD
        seed = (self.stage.seed, "dropout", self.first_step + step, self.workers.rank, index)
        torch.manual_seed(keyed.torch_seed(*seed))
        if not self._has_prefix:
            return None
        inputs = {name: micro_batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        prefix: Callable[..., torch.Tensor] = self._engine.module.prefix
        return prefix(**inputs)

    def someone_wants_to_stop(self) -> bool:
        """Whether any rank said `stop` to the last `train_step`; the same answer on all of them."""
        if self._stop_is_here is not None:
            self._stop_is_here.synchronize()  # passed long ago, at the beginning of the step
        return bool(self._stop.item())

    @torch.no_grad()
    def evaluate_step(self, batch: Batch) -> torch.Tensor:
        """This rank's SUMS over the batch, [6] fp64, dropout off."""
        self._engine.eval()
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.workers.device)
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes would each be compiled anew
            for micro_batch in self._micro_batches(self._to_device(batch)):
                total += self._engine(**micro_batch)
        self._engine.train()
        return total

    def scalars(self) -> dict[str, float]:
        """What the last step has to show: gradient norm before clipping, trust ratios over all matrices, loss scale."""
        shown = {}
        if self._optimizer.gradient_norm is not None:
            shown["gradient_norm"] = self._optimizer.gradient_norm.item()
        if self._optimizer.trust_ratios is not None:
            ratios = self._optimizer.trust_ratios
            for name, value in (("min", ratios.min()), ("median", ratios.median()), ("max", ratios.max())):
                shown[f"trust_ratio_{name}"] = value.item()
        if self._scale is not None:
            shown["loss_scale"] = self._scale.value
        return shown

    def save(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What resuming needs besides the stage base: this rank's tensors, copied to the CPU, and plain numbers.

        Tensors are named KIND/PARAMETER/START: elements from START on of a flattened `weight`, `exp_avg` or
        `exp_avg_sq`, and the `step` that the parameter's bias correction has come to.
        """
        tensors = {}
        pieces = self._optimizer.pieces if self.zero_stage or self.workers.rank == 0 else []
        for index, piece in enumerate(pieces):
            kinds = {"weight": piece.weight(), **{kind: held[index] for kind, held in self._optimizer.moments.items()}}
            for kind, tensor in kinds.items():
                tensors[f"{kind}/{piece.name}/{piece.start}"] = tensor.to("cpu", copy=True)
            if piece.start == 0:
                tensors[f"step/{piece.name}/0"] = torch.tensor([self._optimizer.steps[index]])
        numbers = {"left_out_steps": self.left_out_steps, "handed_bytes": dict(self.handed_bytes)}
        return tensors, numbers | ({} if self._scale is None else {"loss_scale": self._scale.state()})

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], torch.Tensor | None], numbers: dict[str, Any]) -> None:
        """Put back what `save` returned, on any number of workers and in any ZeRO stage, bit for bit.

        `read(kind, name, start, numel)` gives elements of a flattened tensor, None for what was not saved: that stays.
        """
        for index, piece in enumerate(self._optimizer.pieces):
            kinds = {"weight": piece.weight(), **{kind: held[index] for kind, held in self._optimizer.moments.items()}}
            for kind, tensor in kinds.items():
                saved = read(kind, piece.name, piece.start, piece.numel)
                if saved is not None:
                    tensor.copy_(saved)
            steps = read("step", piece.name, 0, 1)
            self._optimizer.steps[index] = 0 if steps is None else int(steps.item())
        self._show_weights_to_model()
        self.left_out_steps = numbers.get("left_out_steps", 0)
        self.handed_bytes = Counter(numbers.get("handed_bytes", {}))
        if self._scale is not None and "loss_scale" in numbers:
            self._scale.__dict__.update(numbers["loss_scale"])

    def export_state(self) -> State:
        """Every parameter of the model on the CPU, in the type in which it is held: fp32, or frozen the type that is
        computed with, and none of what is held in int8. With ZeRO-3 all ranks must call this."""
        state = {}
        for name, parameter in self._engine.module.model.named_parameters():
            gathered = deepspeed.zero.GatheredParameters(parameter) if self.zero_stage == 3 else nullcontext()
            with gathered:
                state[name] = parameter.detach().to("cpu", copy=True)
        return state

    def close(self) -> None:
        """Let go of the module, the optimizer's state and DeepSpeed's hooks."""
        if self._reducer is not None:
            self._reducer.close()
        self._engine.destroy()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        for parameter in self._engine.module.parameters():
            vars(parameter).clear()  # ZeRO ties its optimizer to every parameter
        del self._engine, self._optimizer, self._zero, self._trainable, self._reducer, self._ahead
        gc.collect()  # DeepSpeed's engine is full of cycles; the next stage is built right after

    def _show_weights_to_model(self) -> None:
        """After the masters were written: with ZeRO the model computes with copies of them."""
        if self.zero_stage in (1, 2):
            self._zero.update_lp_params()
        elif self.zero_stage == 3:
            for index in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            if self._zero.persistent_parameters:  # small ones, held whole: gathered anew when next used
                self._zero.persistent_parameters[0].partition(self._zero.persistent_parameters)

    def _remember_stop(self, count: torch.Tensor) -> None:
        """Fetch the number of ranks that want to stop without waiting for the device."""
        self._stop.copy_(count, non_blocking=True)
        if count.is_cuda:
            self._stop_is_here = torch.cuda.Event()
            self._stop_is_here.record()

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.workers.device, non_blocking=True) for name, tensor in batch.items()}

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        parts = {name: tensor.split(self.micro_batch_size) for name, tensor in batch.items()}
        return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]

    def _refuse_another_trainable_set(self, plan: Plan) -> None:
        """The optimizers of all ranks together must hold every element that the plan trains once (without ZeRO, each
        rank all), and nothing else."""
        held = torch.zeros(len(self.sizes), dtype=torch.long, device=self.workers.device)
        position = {name: index for index, name in enumerate(self.sizes)}
        for piece in self._optimizer.pieces:
            held[position[piece.name]] += piece.numel
        if self.zero_stage:
            self.workers.sum(held)
        family = FAMILIES[plan.model.family]
        names = (name for name, _ in self._engine.module.model.named_parameters())
        planned = {name for name in names if slot_of(family, name) in self.stage.trainable}
        wrong = [name for (name, size), found in zip(self.sizes.items(), held.tolist(), strict=True) if found != size]
        wrong += planned ^ self.sizes.keys()
        if wrong:
            raise MsltError(
                f"engine: DeepSpeed {deepspeed.__version__} optimizes another set of parameters than the plan trains: "
                f"{', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}; use a version that setup.py names"
            )

    def _refuse_other_bytes(self, handed: Counter[str], num_micro_batches: int) -> None:
        """What a step handed to collectives must be the gradients of the trainable parameters, to the byte, and with
        ZeRO the weights that the ranks hold for each other."""
        expected = step_bytes(self._config, list(self.sizes.values()), self.workers.size, num_micro_batches)
        found = dict(handed) if self.zero_stage < 3 else {name: handed[name] for name in expected}
        if found != expected:
            raise MsltError(
                f"engine: in the first step collectives were handed {found} bytes, and the parameters that the stage "
                f"trains make {expected}; use a DeepSpeed that setup.py names (this one is {deepspeed.__version__})"
            )


def step_bytes(config: dict[str, Any], sizes: list[int], world_size: int, num_micro_batches: int) -> dict[str, int]:
    """Bytes handed to each collective in a step, by ZeRO stage, for trainable parameters of these numbers of elements.

    ZeRO-0 and 1 reduce the gradients once a step (without ZeRO one worker not at all), ZeRO-2 and 3 after every
    micro-batch. ZeRO-1 and 2 gather the fp32 weights, padded so that every rank has the same even number of elements;
    ZeRO-3 cuts each parameter on its own. (It gathers weights when the forward pass wants them: in the first step as
    often as it comes to them, later once.)
    """
    item = reduced_bytes(config)
    stage, total = zero_stage(config), sum(sizes)
    if stage == 0:
        return {} if world_size == 1 else {"all_reduce": total * item}
    if stage == 3:
        padded = sum(-(-size // world_size) * world_size for size in sizes)
        return {"reduce_scatter_tensor": padded * item * num_micro_batches}
    reduced = {"all_reduce": total * item * (num_micro_batches if stage == 2 else 1)}
    even = -(-total // (2 * world_size)) * 2 * world_size
    return reduced if world_size == 1 else {**reduced, "all_gather_into_tensor": even * 4}


def quiet() -> None:
    """What DeepSpeed, torch and transformers say to their developers is not for the reader of a run."""
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # ours is tested
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
