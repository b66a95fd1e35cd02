"""Small checkpoints with random weights and a tokenizer of a few words, as folders of Hugging Face's."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    ElectraConfig,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = ("good", "fine", "great", "nice", "bad", "poor", "awful", "sad", "film", "book", "a", "the", "is", "was", ".")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "vocab_size": len(SPECIAL) + len(WORDS),
    "pad_token_id": 0,
}
KINDS = {
    "bert": (BertConfig, BertForPreTraining),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
    "electra": (ElectraConfig, ElectraForPreTraining),
}


def write_encoder(folder: Path, kind: str = "bert", seed: int = 0, **shape: int | str) -> Path:
    """A pretraining checkpoint of the kind in KINDS, with its tokenizer."""
    config_class, model_class = KINDS[kind]
    torch.manual_seed(seed)
    model_class(config_class(**{**SHAPE, **shape})).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    given = ["input_ids", "attention_mask", *(["token_type_ids"] if kind != "roberta" else [])]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=given, **names).save_pretrained(folder)
    return folder
