"""SQuAD from the Hugging Face hub: the same questions as in its own files."""

import datasets
import pyarrow as pa

from mslt.errors import MsltError
from mslt.evaluate.squad_data import Answer, Question, Split, Version, checked

NAMES: dict[Version, str] = {"1.1": "rajpurkar/squad", "2.0": "rajpurkar/squad_v2"}
SPLITS: dict[Split, str] = {"train": "train", "dev": "validation"}


def read_hub(version: Version, split: Split) -> list[Question]:
    """Downloads what the hub's cache does not have. MsltError where that fails."""
    name = NAMES[version]
    try:
        rows = datasets.load_dataset(name, split=SPLITS[split])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        said = str(error).strip().splitlines()
        raise MsltError(
            f"{name}: cannot be read from the hub ({said[0] if said else type(error).__name__}); give SQuAD's own "
            "files by --train and --dev"
        ) from None
    return checked([as_question(row) for row in rows], f"{name} ({SPLITS[split]})", version)


def as_question(row: dict) -> Question:
    found = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    return Question(row["id"], row["question"], row["context"], tuple(Answer(text, start) for text, start in found))
