"""The only door to DeepSpeed: workers, and an engine that trains one stage."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from mslt.config import OptimizerConfig
from mslt.data import keyed
from mslt.data.loader import Batch
from mslt.engine.clock import Clock
from mslt.engine.ds_config import complete
from mslt.engine.optimizer import make_optimizer
from mslt.errors import MsltError
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.surgery import State
from mslt.plan import Stage, micro_batch_size

_MLM_LOSS, _MLM_COUNT = SUMS.index("mlm_loss"), SUMS.index("mlm_count")
_NSP_LOSS = SUMS.index("nsp_loss")


@dataclass(frozen=True)
class Workers:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain data) on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        torch.distributed.all_reduce(tensor)
        return tensor


def start_workers(timeout_minutes: int = 30) -> Workers:
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
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    device = torch.device(accelerator.current_device_name())
    return Workers(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


class Engine:
    """One stage's model, optimizer and DeepSpeed engine. Made fresh for every stage, never edited."""

    def __init__(
        self,
        module: PretrainingLoss,
        stage: Stage,
        first_step: int,
        optimizer: OptimizerConfig,
        clip_norm: float,
        ds_config: dict[str, Any],
        workers: Workers,
    ) -> None:
        """`module` is frozen as the stage says; `first_step` is the run's step at which the stage begins."""
        self.stage = stage
        self.first_step = first_step
        self.workers = workers
        self.micro_batch_size = micro_batch_size(stage, workers.size)
        self.clock = Clock(workers.device)
        self.reduced_bytes = 0
        config = complete(ds_config, stage, clip_norm, workers.size)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=make_optimizer(module, optimizer), config=config, dist_init_required=False
        )
        self._engine.enable_backward_allreduce = False  # train_step reduces, once
        self._count_reduced_bytes()
        self._scaler: torch.amp.GradScaler | None = self._engine.torch_autocast_z0_gradscaler
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in module.parameters() if p.requires_grad}, "optimizer and plan disagree"
        self._engine.train()  # not said by deepspeed.initialize; puts the slots that stay still into evaluation mode

    def train_step(self, batch: Batch, step: int, rate: float) -> torch.Tensor:
        """One optimizer step of the stage over this rank's share of the batch. Returns this rank's SUMS, [6].

        The gradient is that of (sum of MLM losses) / (masked positions of the global batch) + (sum of NSP losses) /
        (samples of the global batch): neither world size nor accumulation changes it. Without next-sentence prediction
        the second part is 0.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = self._to_device(batch)
        with self.clock.span("reduce"):
            # One at least: whole words that are all over the budget leave nothing to predict.
            mlm_count = self.workers.sum((batch["mlm_labels"] >= 0).sum()).clamp(min=1)
        # DeepSpeed averages gradients over the workers; times their number makes that a sum.
        mlm_weight, nsp_weight = self.workers.size / mlm_count, self.workers.size / self.stage.batch_size
        total = torch.zeros(len(SUMS), device=self.workers.device)
        for index, micro_batch in enumerate(self._micro_batches(batch)):
            seed = (self.stage.seed, "dropout", self.first_step + step, self.workers.rank, index)
            torch.manual_seed(keyed.torch_seed(*seed))
            with self.clock.span("forward"):
                sums = self._engine(**micro_batch)
                loss = sums[_MLM_LOSS] * mlm_weight + sums[_NSP_LOSS] * nsp_weight
            with self.clock.span("backward"):
                self._engine.backward(loss, scale_wrt_gas=False)
            total += sums.detach()
        with self.clock.span("reduce"):
            self._engine.allreduce_gradients()
        with self.clock.span("optimizer"):
            self._engine.step()
        return total

    @torch.no_grad()
    def evaluate_step(self, batch: Batch) -> torch.Tensor:
        """This rank's SUMS over the batch, [6] fp64, dropout off."""
        self._engine.eval()
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.workers.device)
        for micro_batch in self._micro_batches(self._to_device(batch)):
            total += self._engine(**micro_batch)
        self._engine.train()
        return total

    def scalars(self) -> dict[str, float]:
        """What the engine itself has to show at a log point."""
        return {} if self._scaler is None else {"loss_scale": self._scaler.get_scale()}

    def save(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What resuming needs besides the stage base: tensors on the CPU, and plain numbers."""
        tensors = {}
        for name, parameter in self.trainable().items():
            tensors[f"weight/{name}"] = parameter.detach().cpu()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.cpu()
        numbers: dict[str, Any] = {"optimizer_steps": [group["step"] for group in self._optimizer.param_groups]}
        if self._scaler is not None:
            numbers["loss_scaler"] = self._scaler.state_dict()
        return tensors, numbers

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Put back what `save` returned, bit for bit."""
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(tensors[f"weight/{name}"])
                self._optimizer.state[parameter] = {
                    key: tensors[f"{key}/{name}"].to(self.workers.device) for key in ("exp_avg", "exp_avg_sq")
                }
        for group, steps in zip(self._optimizer.param_groups, numbers["optimizer_steps"], strict=True):
            group["step"] = steps
        if self._scaler is not None:
            self._scaler.load_state_dict(numbers["loss_scaler"])

    def export_state(self) -> State:
        """Every parameter of the model, fp32, on the CPU."""
        model = self._engine.module.model
        return {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}

    def close(self) -> None:
        """Let go of the module, the optimizer's state and DeepSpeed's hooks."""
        self._engine.destroy()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        del self._engine, self._optimizer
        gc.collect()  # DeepSpeed's engine is full of cycles; the next stage is built right after

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self._engine.module.model.named_parameters() if p.requires_grad}

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.workers.device, non_blocking=True) for name, tensor in batch.items()}

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        parts = {name: tensor.split(self.micro_batch_size) for name, tensor in batch.items()}
        return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]

    def _count_reduced_bytes(self) -> None:
        """Count what DeepSpeed hands to the gradient all-reduce, bucket by bucket, in the dtype on the wire."""
        reduce_bucket = self._engine.allreduce_bucket
        item_bytes = self._engine.communication_data_type.itemsize

        def counted(bucket: list[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            self.reduced_bytes += sum(tensor.numel() for tensor in bucket) * item_bytes
            return reduce_bucket(bucket, *args, **kwargs)

        self._engine.allreduce_bucket = counted


def quiet() -> None:
    """DeepSpeed's lines below a warning and transformers' bars for single files are not for the reader of a run."""
    deepspeed.utils.logger.setLevel("WARNING")
    transformers.utils.logging.disable_progress_bar()
