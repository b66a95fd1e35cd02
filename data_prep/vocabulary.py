"""WordPiece vocabularies: trained the same way twice, or taken from a vocab.txt; stored as a Hugging Face tokenizer."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

from mslt.data.manifest import TOKENIZER_FILE
from mslt.data.shards import special_ids
from mslt.errors import MsltError
from mslt.files import write_json, write_text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"
# Characters kept, the most frequent of the text; each may take two entries (a, ##a). 1000 is what the trainer of
# tokenizers keeps; small vocabularies keep fewer, so that pieces have room. A word with a rarer one is [UNK].
MIN_ALPHABET, MAX_ALPHABET = 100, 1000
ALPHABET_SHARE = 16


def train_vocabulary(
    read_texts: Callable[[], Iterable[str]], size: int, lowercase: bool, min_frequency: int
) -> list[str]:
    """Tokens of a new WordPiece vocabulary, in the order of their ids; at most `size`, fewer where text is short.

    `read_texts` is called twice and must give the same texts in the same order: once to count characters, once to
    train. The trainer of tokenizers 0.23 numbers the continuation pieces ("##a") in the order of a randomly keyed
    hash map and breaks ties between merges by those numbers: four runs over 6 MB gave one token set and four
    numberings, and with more ties the set itself varies. So all single characters are given to it beforehand, in
    one order, which fixes every tie; and the ids are numbered anew, canonically.
    """
    bare = build_tokenizer(list(SPECIALS), lowercase)
    limit = min(MAX_ALPHABET, max(MIN_ALPHABET, size // ALPHABET_SHARE))
    alphabet = count_alphabet(bare, read_texts(), limit, min_frequency)
    if not alphabet:
        raise MsltError("vocabulary: no character occurs often enough to train on; lower min_frequency or add text")
    continuations = [PREFIX + character for character in alphabet if can_continue(bare, character)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIALS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    learner = Tokenizer(WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = bare.normalizer, bare.pre_tokenizer
    learner.train_from_iterator(read_texts(), trainer)
    return canonical_order(learner.get_vocab())


def count_alphabet(bare: Tokenizer, texts: Iterable[str], limit: int, min_frequency: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(bare.normalizer.normalize_str(text))
    often = [c for c, count in counts.items() if count >= min_frequency and not c.isspace()]
    return sorted(sorted(often, key=lambda c: (-counts[c], c))[:limit])


def can_continue(bare: Tokenizer, character: str) -> bool:
    """Whether the character can stand inside a word: punctuation and Chinese characters are words of their own."""
    word = bare.normalizer.normalize_str(f"a{character}a")
    return len(bare.pre_tokenizer.pre_tokenize_str(word)) == 1


def canonical_order(tokens: Iterable[str]) -> list[str]:
    """Specials, then characters, then ##characters, then the longer pieces; each group sorted. The same set of
    tokens gets the same ids however it was found; WordPiece takes the longest match, whatever the ids."""

    def rank(token: str) -> tuple[int, str]:
        if token in SPECIALS:
            return 0, str(SPECIALS.index(token))
        continues = token.startswith(PREFIX) and len(token) > len(PREFIX)
        if len(token) - len(PREFIX) * continues == 1:
            return 1 + continues, token
        return 3, token

    return sorted({*tokens, *SPECIALS}, key=rank)


def read_vocabulary(path: Path) -> list[str]:
    """Tokens of a vocab.txt, one a line, the line's number its id; MsltError if BERT's specials are not in it."""
    if not path.is_file():
        raise MsltError(f"{path}: no such vocabulary file; correct vocabulary.file, or leave it out to train one")
    try:
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise MsltError(f"{path}: not UTF-8 text; vocabulary.file is a vocab.txt with one token a line") from error
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise MsltError(f"{path}: tokens listed twice: {repeated[:5]}; a vocab.txt holds each token once")
    special_ids(build_tokenizer(tokens, lowercase=True), str(path))
    return tokens


def read_pretrained(name: str) -> Tokenizer:
    """A BERT tokenizer on the Hugging Face hub or in a folder, as it is; MsltError if there is none, or it is no
    WordPiece tokenizer with BERT's specials."""
    file = Path(name).expanduser() / TOKENIZER_FILE
    try:
        loaded = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises no other type
        raise MsltError(
            f"vocabulary.pretrained: no {TOKENIZER_FILE} of {name} in a folder or on the hub ({error}); correct the "
            "name, or give a vocab.txt as vocabulary.file"
        ) from error
    ids, kind = loaded.get_vocab(), type(loaded.model).__name__
    lowercase = getattr(loaded.normalizer, "lowercase", None)
    if kind != "WordPiece" or lowercase is None:
        raise MsltError(
            f"vocabulary.pretrained: {name} is a {kind} tokenizer, shards need BERT's WordPiece; name a BERT tokenizer "
            "or train a vocabulary"
        )
    tokens = sorted(ids, key=ids.__getitem__)
    if ids[tokens[-1]] != len(tokens) - 1:
        raise MsltError(f"vocabulary.pretrained: the ids of {name} have gaps; train a vocabulary")
    special_ids(loaded, name)
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def build_tokenizer(tokens: list[str], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer over these tokens, the index of each its id."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    if all(token in vocabulary for token in SPECIALS):
        tokenizer.add_special_tokens(list(SPECIALS))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a folder that `AutoTokenizer.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, normalizer = tokenizer.get_vocab(), tokenizer.normalizer
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIALS}
    write_text(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
    write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__)))
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
            **names,
        },
    )


def encode_sentences(tokenizer: Tokenizer, sentences: list[str]) -> Iterator[list[int]]:
    """Token ids of each sentence, without special tokens. Text that spells one, an article on "[MASK]", is text:
    it must not reach the model as the special itself."""
    tokenizer.encode_special_tokens = True
    for encoding in tokenizer.encode_batch_fast(sentences, add_special_tokens=False):
        yield encoding.ids
