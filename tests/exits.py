"""Small classifiers with ramps whose answers differ from layer to layer, and batches of unlike lengths."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mslt.heads.early_exit import EarlyExitModel
from mslt.heads.off_ramp import Pooling, RampOptions
from tests.checkpoints import OWN, SHAPE

KINDS = tuple(OWN)


def classifier(kind: str = "Bert", num_labels: int = 2, seed: int = 0, **shape: Any) -> PreTrainedModel:
    """Weights spread enough that rows differ; vocabulary of 64."""
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": 64, "initializer_range": 0.2, "num_labels": num_labels, **SHAPE, "num_hidden_layers": 4,
           **OWN[kind], **shape}
    )  # fmt: skip
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def with_exits(kind: str = "Bert", num_labels: int = 2, seed: int = 0, pooling: Pooling = "cls") -> EarlyExitModel:
    """Ramps whose logits lie around 0 and far apart, so that rows are sure, and of one mind, at unlike layers."""
    exits = EarlyExitModel.from_finetuned(classifier(kind, num_labels, seed), RampOptions(pooling=pooling), seed + 1)
    inputs = batch(64, seed=2)
    with torch.no_grad():
        for ramp in exits.ramps:
            ramp.output.weight.mul_(4)
        for ramp, logits_BC in zip(exits.ramps, exits.all_logits(**inputs)[:-1], strict=True):
            ramp.output.bias.sub_(logits_BC.mean(0))
    return exits


def batch(num_rows: int = 32, most: int = 20, seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows of 3 to `most` tokens, padded with 0; one is as long as that."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, most + 1, (num_rows,), generator=draw)
    lengths[num_rows // 2] = most
    mask = (torch.arange(most) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 64, (num_rows, most), generator=draw) * mask, "attention_mask": mask}


def row(inputs: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One row, without its padding."""
    length = int(inputs["attention_mask"][index].sum())
    return {name: tensor[index : index + 1, :length] for name, tensor in inputs.items()}


def middle_threshold(exits: EarlyExitModel, inputs: dict[str, torch.Tensor]) -> float:
    """One at which rows leave at many layers, farther than rounding from every entropy."""
    entropies = exits(**inputs).entropies[:, :-1].flatten().sort().values
    gaps = entropies.diff()
    middle = slice(len(gaps) // 8, len(gaps) // 2)
    index = int(gaps[middle].argmax()) + middle.start
    return float((entropies[index] + entropies[index + 1]) / 2)
