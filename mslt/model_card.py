"""The model card of a stage's end, as the Hugging Face hub shows it: README.md of the model folder."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from mslt.cost import stage_cost
from mslt.data.manifest import Manifest
from mslt.plan import Plan, autocast_dtype, sources_in_words, trainable_in_words

Evaluations = tuple[dict[str, float], dict[str, float]]  # held-out means before a stage and after it


def model_card(plan: Plan, manifest: Manifest, evaluations: Sequence[Evaluations], origin: dict[str, Any]) -> str:
    """Of the stage that the last of `evaluations` belongs to, one for each stage so far. `origin` is its provenance."""
    number, stage = len(evaluations), plan.stages[len(evaluations) - 1]
    model = plan.model
    about = ModelCardData(
        language=plan.card.language,
        license=plan.card.license,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=[model.family, "pretraining", "mslt"],
    )
    rest = "" if number == len(plan.stages) else " It is an intermediate state: more stages were planned."
    where = f" in stages; this is the end of stage {number} of {len(plan.stages)}" if len(plan.stages) > 1 else ""
    parameters = stage_cost(model, stage).total_parameters
    return "\n".join(
        [
            "---",
            about.to_yaml(),
            "---",
            "",
            f"# {model.family.upper()}, {stage.depth} layers × {model.hidden_size}",
            "",
            f"An encoder of {parameters / 1e6:,.1f} M parameters, pretrained by mslt{where}.{rest}",
            "",
            "```python",
            "from transformers import AutoModelForPreTraining, AutoTokenizer",
            "",
            'name = "."  # this folder, or its name on the hub',
            "model = AutoModelForPreTraining.from_pretrained(name)",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            "```",
            "",
            "## Held-out losses",
            "",
            *_losses(manifest, evaluations[-1][1]),
            "",
            "## Training",
            "",
            *_training(plan, evaluations),
            "",
            "## Data",
            "",
            *_data(manifest),
            "",
            "## Limits",
            "",
            *_limits(plan, number),
            "",
            "## Provenance",
            "",
            f"Plan {origin['plan'][:16]}, stage {number}, {origin['samples']:,} samples; mslt {origin['mslt']}"
            f"{'' if origin['commit'] is None else ', commit ' + origin['commit']}, "
            + ", ".join(f"{name} {origin['versions'][name]}" for name in ("torch", "deepspeed", "transformers"))
            + ". provenance.json says more.",
            "",
        ]
    )


def _losses(manifest: Manifest, after: dict[str, float]) -> list[str]:
    rows = [f"| masked language modelling | {after['mlm_loss']:.4f} nats | {after['mlm_accuracy']:.1%} |"]
    if "nsp_loss" in after:
        rows.append(f"| next sentence | {after['nsp_loss']:.4f} nats | {after['nsp_accuracy']:.1%} |")
    known = manifest.unigram_entropy_nats
    beside = "" if known is None else f" Knowing nothing but how often each token occurs costs {known:.4f} nats."
    return [
        "| | loss | accuracy |",
        "| --- | ---: | ---: |",
        *rows,
        "",
        f"On documents that were not trained on, at fixed masks.{beside}",
    ]


def _training(plan: Plan, evaluations: Sequence[Evaluations]) -> list[str]:
    rows = [
        f"| {number} | {stage.depth} | {sources_in_words(stage.sources)} | {trainable_in_words(stage)} "
        f"| {stage.steps:,} | {stage.steps * stage.batch_size * stage.sequence_length:,} | {before['mlm_loss']:.4f} "
        f"| {after['mlm_loss']:.4f} |"
        for number, (stage, (before, after)) in enumerate(zip(plan.stages, evaluations, strict=False), 1)
    ]
    stage, optimizer = plan.stages[0], plan.optimizer
    return [
        "| stage | layers | from | trains | steps | positions | held-out MLM before | after |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        "Layers count from 0; a stage begins with copies of the layers of the one before, as `from` says.",
        f"{optimizer.name.upper()}, peak learning rate {stage.learning_rate.peak:g}, {optimizer.warmup_steps:,} steps "
        f"of warm-up, weight decay {optimizer.weight_decay:g}; batches of {stage.batch_size:,} samples of "
        f"{stage.sequence_length} tokens, {plan.data.mask_probability:.0%} masked (at most "
        f"{plan.data.max_predictions}); {autocast_dtype(plan.engine) or 'fp32'}.",
    ]


def _data(manifest: Manifest) -> list[str]:
    train, heldout = manifest.splits["train"], manifest.splits["validation"]
    kinds = ", ".join(f"{source.kind} ({source.kept.documents:,} documents)" for source in manifest.sources)
    case = "lower case" if manifest.tokenizer.lowercase else "cased"
    return [
        f"{kinds}: {train.tokens:,} tokens to train on, {heldout.tokens:,} held out. Vocabulary of "
        f"{manifest.tokenizer.vocab_size:,} entries, {case}. Corpus {manifest.hash[:16]} (sha256 of its manifest).",
    ]


def _limits(plan: Plan, number: int) -> list[str]:
    trained = max(stage.sequence_length for stage in plan.stages[:number])
    found = ["- It has only been pretrained: fine-tune it before use.", "- It repeats what its texts say and assume."]
    if trained < plan.model.max_position_embeddings:
        found.append(
            f"- Positions from {trained} on were never trained: fine-tune on at most {trained} tokens, or after a "
            "phase at more."
        )
    if plan.card.license == "unknown":
        found.append("- No licence was named: `card: {license: …}` in the recipe, or the line above, does that.")
    return found
