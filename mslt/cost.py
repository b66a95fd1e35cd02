"""What a stage costs, from its shape alone: parameters and bytes of gradient.

With hidden width H, intermediate width I, vocabulary V, positions P and token types Y, a BERT slot has
  embeddings  (V + P + Y)·H + 2H          word, position, type, LayerNorm; the MLM decoder's weight is tied to it
  layer       4(H² + H) + 2HI + I + H + 4H  Q, K, V and output; the two dense layers; two LayerNorms
  pooler      H² + H
  mlm_head    H² + H + 2H + V             transform, its LayerNorm, the decoder's bias
  nsp_head    2H + 2
"""

from dataclasses import dataclass

from mslt.config import ModelConfig
from mslt.plan import Stage, all_slots


def slot_parameters(model: ModelConfig, slot: str) -> int:
    """Number of parameters in one slot; the formulas are at the top of this file."""
    width, inner = model.hidden_size, model.intermediate_size
    if slot == "embeddings":
        return (model.vocab_size + model.max_position_embeddings + model.type_vocab_size) * width + 2 * width
    if slot.startswith("layer."):
        return 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return {
        "pooler": width * width + width,
        "mlm_head": width * width + width + 2 * width + model.vocab_size,
        "nsp_head": 2 * width + 2,
    }[slot]


@dataclass(frozen=True)
class StageCost:
    """Gradient bytes are what one worker hands to the all-reduce in a step: trainable parameters times 4 or 2."""

    total_parameters: int
    trainable_parameters: int
    fp32_gradient_bytes: int
    half_gradient_bytes: int


def stage_cost(model: ModelConfig, stage: Stage) -> StageCost:
    total = sum(slot_parameters(model, slot) for slot in all_slots(stage.depth))
    trainable = sum(slot_parameters(model, slot) for slot in stage.trainable)
    return StageCost(total, trainable, 4 * trainable, 2 * trainable)


def relative_step_cost(stage: Stage) -> float:
    """Compute of a step in forward passes of one layer: every layer forward, trainable ones backward at twice that.

    A rough weight for time left; `r = 2` is compute alone, without heads and communication.
    """
    return stage.depth + 2 * sum(slot.startswith("layer.") for slot in stage.trainable)
