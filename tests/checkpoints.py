"""Small checkpoints of the families that are read, with random weights and the tokenizer of shards, as anybody saves
them."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
OWN: dict[str, dict[str, Any]] = {
    "Bert": {"max_position_embeddings": 32},
    "Roberta": {"max_position_embeddings": 33, "type_vocab_size": 1, "pad_token_id": 0},  # 32 tokens
    "Electra": {"max_position_embeddings": 32, "embedding_size": 16},
}


def write(folder: Path, tokenizer: Path, model_class: str, seed: int = 0, **shape: Any) -> Path:
    """A folder with a model of this class of transformers', weights ten times as far from 0 as it would draw them, so
    that attention is uneven."""
    family = next(name for name in OWN if model_class.startswith(name))
    config = getattr(transformers, f"{family}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(
        config(**{"vocab_size": 512, "initializer_range": 0.2, **SHAPE, **OWN[family], **shape})
    )
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder
