"""How long a sequence a checkpoint can read, and how long a one it was trained on."""

from transformers import PretrainedConfig

from mslt.errors import MsltError
from mslt.models import families
from mslt.rundir import RunDir, read_plan


def refuse_over_positions(config: PretrainedConfig, source: str, num_tokens: int, option: str) -> None:
    """MsltError where the model has fewer positions than the tokens that `option` asks for."""
    room = families.num_positions(config)
    if num_tokens > room:
        raise MsltError(
            f"{option} {num_tokens}: {source} has {room} positions; give {room} or less, or a checkpoint pretrained "
            "with more max_position_embeddings"
        )


def untrained_positions(source: str, origin: tuple[RunDir, int] | None, num_tokens: int) -> str | None:
    """What to warn of where the checkpoint is of a run (its stage index besides), and no stage up to it had sequences
    as long as these; None of any other."""
    if origin is None:
        return None
    run, stage_index = origin
    try:
        plan = read_plan(run)
    except MsltError as error:
        return f"{source}: how long its sequences were is not known ({error})"
    trained = max(stage.sequence_length for stage in plan.stages[: stage_index + 1])
    if num_tokens <= trained:
        return None
    return (
        f"{source}: positions {trained} … {num_tokens - 1} were never trained (the run's sequences had {trained} "
        f"tokens): scores are lower than this encoder's worth; read {trained} tokens, or train a stage with longer "
        "sequences first"
    )
