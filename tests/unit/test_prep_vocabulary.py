"""Vocabularies: the same twice, Hugging Face loads them, special tokens stay special."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizerFast

from data_prep.vocabulary import (
    SPECIALS,
    build_tokenizer,
    canonical_order,
    encode_sentences,
    read_vocabulary,
    save_tokenizer,
    train_vocabulary,
)
from mslt.errors import MsltError

# Words that occur equally often, so that every merge is a tie.
TIES = [" ".join(a + b + c + d for a in "bdfgk" for b in "aeiou" for c in "lmnrst" for d in "aeiou")] * 3


def test_the_same_text_gives_the_same_vocabulary() -> None:
    first = train_vocabulary(lambda: TIES, 256, True, 2)
    assert len(first) == 256
    assert all(train_vocabulary(lambda: TIES, 256, True, 2) == first for _ in range(5))


def test_ids_do_not_depend_on_the_order_of_training() -> None:
    tokens = train_vocabulary(lambda: TIES, 256, True, 2)
    assert canonical_order(reversed(tokens)) == tokens
    assert tokens[:5] == list(SPECIALS)
    assert tokens[5] == "a"


def test_saved_folder_is_byte_identical_and_loads_in_transformers(tmp_path: Path) -> None:
    text = ["The quick brown fox, the Café and 中文! " * 3]
    for name in "ab":
        save_tokenizer(tmp_path / name, build_tokenizer(train_vocabulary(lambda: text, 256, True, 1), True))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    ours = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    for kind in (AutoTokenizer, BertTokenizerFast):
        theirs = kind.from_pretrained(tmp_path / "a")
        for sentence in (*text, "unseen Ωmega", "A [MASK] b"):
            assert theirs(sentence)["input_ids"] == ours.encode(sentence).ids
        assert theirs.mask_token_id == 4
        assert theirs("a", "b")["token_type_ids"] == ours.encode("a", "b").type_ids


def test_cased_vocabulary_stays_cased_in_transformers(tmp_path: Path) -> None:
    tokens = train_vocabulary(lambda: ["Fox fox FOX Café "] * 3, 256, False, 1)
    save_tokenizer(tmp_path, build_tokenizer(tokens, False))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.tokenize("Fox Café") == build_tokenizer(tokens, False).encode("Fox Café").tokens[1:-1]
    assert "F" in "".join(theirs.tokenize("Fox"))


def test_text_that_spells_a_special_token_is_text() -> None:
    tokenizer = build_tokenizer(train_vocabulary(lambda: ["mask sep [ ] MASK "] * 3, 256, True, 1), True)
    ids = next(encode_sentences(tokenizer, ["mask [MASK] [SEP]"]))
    assert min(ids) >= len(SPECIALS)


def test_every_kept_character_can_be_spelled_anywhere() -> None:
    tokenizer = build_tokenizer(train_vocabulary(lambda: ["abc"] * 3, 256, True, 1), True)
    assert 1 not in next(encode_sentences(tokenizer, ["cab bca"]))


def test_vocabulary_files(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\nhello\n")
    with pytest.raises(MsltError, match=r"vocab.txt: the vocabulary lacks \[SEP\], \[MASK\]"):
        read_vocabulary(path)
    path.write_text("hello\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    with pytest.raises(MsltError, match="listed twice"):
        read_vocabulary(path)
    path.write_text("hello\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    assert read_vocabulary(path)[0] == "hello"
    with pytest.raises(MsltError, match="no such vocabulary file"):
        read_vocabulary(tmp_path / "none.txt")
