"""Held-out loss and accuracy of masked words and of next sentences at fixed samples and masks, for any checkpoint: of a
run's model the numbers that the run logged.

B batch, T tokens, M masked positions (padded), V vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedModel

from mslt.config import DataConfig, TrainingConfig
from mslt.data.loader import EVALUATION_SEED, Batch, Samples, evaluation_batches
from mslt.data.manifest import TOKENIZER_FILE
from mslt.data.shards import Shards, open_shards
from mslt.errors import MsltError
from mslt.evaluate.fine_tune import PRECISIONS
from mslt.evaluate.opening import locate, open_config, open_model, open_tokenizer, vocabulary_difference
from mslt.evaluate.positions import refuse_over_positions
from mslt.files import sha256_file
from mslt.models import families
from mslt.models.forward import SUMS, PretrainingLoss, means
from mslt.models.loss import head_sums
from mslt.plan import NEXT_SENTENCE_SLOTS, autocast_dtype
from mslt.rundir import RunDir, read_plan
from mslt.validation import validate

BATCH_SIZE = 32  # outside of a run
Forward = Callable[[Batch], torch.Tensor]  # a batch → SUMS, [6]


@dataclass(frozen=True)
class Settings:
    """What is evaluated on, and in which precision. `batch_size` only rounds."""

    data: DataConfig
    sequence_length: int
    batch_size: int
    precision: str


def settings_for(origin: tuple[RunDir, int] | None, shards: Path, **changes: Any) -> Settings:
    """A run's own, outside of a run the recipes' defaults; with the `changes` that are not None, by the names of
    Settings and DataConfig. MsltError for values that cannot be."""
    given = {name: value for name, value in changes.items() if value is not None}
    data: dict[str, Any] = {"shards": str(shards)}
    settings = Settings(DataConfig(**data), TrainingConfig.model_fields["sequence_length"].default, BATCH_SIZE, "fp32")
    if origin is not None:
        plan = read_plan(origin[0])
        stage = plan.stages[origin[1]]
        names = {"bfloat16": "bf16", "float16": "fp16", None: "fp32"}
        settings = Settings(
            plan.data, stage.sequence_length, stage.micro_batch_size, names[autocast_dtype(plan.engine)]
        )
        data = plan.data.model_dump() | data
    data |= {name: given.pop(name) for name in list(given) if name in DataConfig.model_fields}
    settings = replace(settings, data=validate(DataConfig, data, "mslt evaluate mlm"), **given)
    if settings.data.max_predictions >= settings.sequence_length:
        raise MsltError(
            f"--max-predictions {settings.data.max_predictions}: is not below --sequence-length "
            f"{settings.sequence_length}; take fewer"
        )
    return settings


def evaluate_mlm(
    checkpoint: str, shards: Path, device: torch.device, progress: Callable[[int, int], None], **changes: Any
) -> dict[str, Any]:
    """Means and accuracies of both heads, as a run's records name them (without an NSP head none of it), what they were
    measured on, what a run logged of this model on the same, and `remarks`.

    `progress` is told how many samples are done. MsltError for a checkpoint without an MLM head, shards of another
    vocabulary, more tokens than the model has positions, or a loss that is not finite."""
    source, origin = locate(checkpoint)
    settings = settings_for(origin, shards, **changes)
    config, tokens = open_config(source), settings.sequence_length
    refuse_over_positions(config, source, tokens, "--sequence-length")
    heldout = open_shards(shards, "validation")
    _refuse_other_vocabulary(source, config.vocab_size, heldout)
    forward = open_forward(source, settings, device)
    samples = Samples(heldout, settings.data, tokens, EVALUATION_SEED)
    num_samples = min(settings.data.evaluation_samples, samples.order.num_samples(0))
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for index, batch in enumerate(evaluation_batches(samples, settings.batch_size, rank=0, world_size=1), 1):
            sums += forward({name: tensor.to(device) for name, tensor in batch.items()})
            progress(min(index * settings.batch_size, num_samples), num_samples)
    if not sums.isfinite().all():
        raise MsltError(f"{source}: its loss is not finite; its weights are damaged, training diverged, or --precision "
                        f"{settings.precision} does not hold them")  # fmt: skip
    logged, remarks = (None, []) if origin is None else _what_was_logged(origin, settings, heldout)
    return {
        "checkpoint": source,
        **means(sums),
        "mlm_tokens": round(sums[SUMS.index("mlm_count")].item()),
        "samples": num_samples,
        "sequence_length": tokens,
        "precision": settings.precision,
        "data": settings.data.model_dump(),
        "shards_sha256": heldout.manifest.hash,
        "unigram_entropy_nats": heldout.manifest.unigram_entropy_nats,
        "logged": logged,
        "remarks": remarks,
    }


def open_forward(source: str, settings: Settings, device: torch.device) -> Forward:
    """What sums up a batch's losses, on `device`. BERT's is that of training, without NSP where the checkpoint has no
    head for it; MsltError for one without an MLM head."""
    autocast = PRECISIONS[settings.precision]
    if open_config(source).model_type not in families.FAMILIES:
        masked, missing = open_model(source, AutoModelForMaskedLM)
        _refuse_without_head(source, missing)
        masked.to(device)
        return lambda batch: masked_sums(masked, batch, autocast)
    model, missing = open_model(source, AutoModelForPreTraining)
    family = families.family_of(model.config)
    of_nsp = [name for name in missing if families.slot_of(family, name) in NEXT_SENTENCE_SLOTS]
    _refuse_without_head(source, [name for name in missing if name not in of_nsp])
    has_nsp = settings.data.next_sentence_prediction and not of_nsp
    loss = PretrainingLoss(model, next_sentence_prediction=has_nsp, autocast=autocast).to(device).eval()
    return lambda batch: loss(**batch)


def masked_sums(model: PreTrainedModel, batch: Batch, autocast: torch.dtype | None) -> torch.Tensor:
    """[6] fp32, named by SUMS, those of NSP 0: by transformers' own forward pass, over all positions."""
    types = batch["token_type_ids"] if model.config.type_vocab_size > 1 else None
    with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        logits_BTV = model(batch["input_ids"], batch["attention_mask"], token_type_ids=types).logits
    logits_BMV = logits_BTV.take_along_dim(batch["mlm_positions"][:, :, None], 1)
    sums = head_sums(logits_BMV.flatten(0, 1), batch["mlm_labels"].flatten())
    return torch.cat([sums, torch.zeros_like(sums)])


def _refuse_without_head(source: str, missing: list[str]) -> None:
    if missing:
        raise MsltError(
            f"{source}: has no MLM head, or not all of its weights ({', '.join(missing[:3])}"
            f"{', …' * (len(missing) > 3)} missing), so that its loss would be of random weights; take a checkpoint "
            "that was pretrained with masked words and saved with that head (of ELECTRA the generator)"
        )


def _refuse_other_vocabulary(source: str, vocab_size: int, shards: Shards) -> None:
    """Equal files are equal vocabularies; others are compared entry by entry."""
    theirs = shards.tokenizer_folder / TOKENIZER_FILE
    ours = Path(source) / TOKENIZER_FILE
    remedy = "prepare shards with this checkpoint's vocabulary: `vocabulary: {pretrained: …}` of `mslt data prepare`"
    if not (ours.is_file() and sha256_file(ours) == shards.manifest.tokenizer.sha256):
        vocabulary = Tokenizer.from_file(str(theirs)).get_vocab()
        difference = vocabulary_difference(vocabulary, open_tokenizer(source).get_vocab())
        if difference is not None:
            raise MsltError(f"{source}: its vocabulary is not that of the shards in {shards.folder} ({difference}); "
                            f"{remedy}")  # fmt: skip
    if vocab_size < shards.vocab_size:
        raise MsltError(
            f"{source}: has embeddings of {vocab_size:,} entries, the shards in {shards.folder} a vocabulary of "
            f"{shards.vocab_size:,}; {remedy}"
        )


def _what_was_logged(
    origin: tuple[RunDir, int], settings: Settings, shards: Shards
) -> tuple[dict[str, float] | None, list[str]]:
    """What the run logged of the model at the stage's end, None where it was measured otherwise; and remarks on why the
    numbers may differ."""
    (run, stage_index), plan = origin, read_plan(origin[0])
    stage, summary = plan.stages[stage_index], run.stage(stage_index).summary
    own, remarks = settings_for(origin, shards.folder), []
    if shards.manifest.hash != plan.shards_sha256:
        remarks.append("other shards than the run's")
    if (own.data, own.sequence_length, own.precision) != (settings.data, settings.sequence_length, settings.precision):
        remarks.append("other settings than the run's")
    if remarks or not summary.is_file():
        return None, remarks
    if stage.frozen_precision == "int8" and stage.frozen:
        remarks.append("the run computed this stage's frozen layers in int8; here they are exact")
    return json.loads(summary.read_text())["evaluation_after"], remarks
