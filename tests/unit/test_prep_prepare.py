"""From a recipe to a shard folder and back: contents, splits, refusals, and nothing half-written."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import BertNormalizer

from data_prep.assemble import count_tokens, unigram_cross_entropy
from data_prep.duplicates import hash_text
from data_prep.prepare import locked, prepare
from data_prep.recipe import DataRecipe
from data_prep.sentences import split_sentences
from data_prep.tokenizing import choose_split
from data_prep.verify import verify
from mslt.data.manifest import read_manifest
from mslt.data.shards import SpecialIds, open_shards, shard_entry, write_shard
from mslt.errors import MsltError
from mslt.files import whole_folder
from mslt.validation import read_yaml, validate

WORDS = ["the", "river", "house", "of", "a", "small", "old", "town", "where", "people", "walk", "about", "rain"]


def make_text(index: int) -> str:
    """A document of three short paragraphs, its own for each index."""
    rng = np.random.default_rng(index)
    sentences = [" ".join(rng.choice(WORDS, 7)).capitalize() + "." for _ in range(6)]
    return f"Document {index}.\n\n" + " ".join(sentences[:3]) + "\n\n" + "\n".join(sentences[3:])


def make_sources(folder: Path, num_documents: int = 40) -> Path:
    folder.mkdir()
    for index in range(num_documents):
        (folder / f"{index:03d}.txt").write_text(make_text(index))
    (folder / "short.txt").write_text("Too short.")
    (folder / "stars.txt").write_text("* * *")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_recipe(path: Path, **changes: Any) -> DataRecipe:
    values = {"sources": [{"kind": "text", "path": str(path)}], "vocabulary": {"size": 256}, "validation_share": 0.2}
    return validate(DataRecipe, values | changes, "test")


def in_split(split: str, text: str, validation_share: float) -> bool:
    held_out = choose_split(np.array([hash_text("\n".join(split_sentences(text)))], np.uint64), validation_share)
    return bool(held_out[0]) == (split == "validation")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    prepare(make_recipe(make_sources(tmp_path / "text")), tmp_path / "shards", piece_bytes=2000)
    return tmp_path / "shards"


def test_shards_hold_the_documents(made: Path) -> None:
    manifest = read_manifest(made)
    source, train, validation = manifest.sources[0], manifest.splits["train"], manifest.splits["validation"]
    assert {rule: amount.documents for rule, amount in source.dropped.items()} == {"empty": 1, "short": 1}
    assert source.read.bytes == sum(path.stat().st_size for path in (made.parent / "text").iterdir())
    assert sum([amount for amount in source.dropped.values()], source.kept) == source.read
    assert (source.files, source.kept.documents) == (42, 40)
    assert train.documents + validation.documents == 40
    assert validation.documents > 0
    assert len(train.shards) > 1
    tokenizer = Tokenizer.from_file(str(made / "tokenizer/tokenizer.json"))
    texts = [" ".join(make_text(i).replace("\n\n", "\x00").split()).replace("\x00", "\n") for i in range(40)]
    for split in ("train", "validation"):
        shards = open_shards(made, split)
        expected = [t for t in texts if in_split(split, t, 0.2)]
        assert shards.num_documents == len(expected)
        assert shards.num_sentences == manifest.splits[split].sentences
        for document, text in enumerate(expected):
            first, last = shards.document_starts[document : document + 2]
            sentences = [e.ids for e in tokenizer.encode_batch(split_sentences(text), add_special_tokens=False)]
            assert [shards.tokens(i, i + 1).tolist() for i in range(first, last)] == sentences
            assert shards.tokens(first, last).tolist() == [token for sentence in sentences for token in sentence]
            assert np.diff(shards.token_starts[first : last + 1]).tolist() == list(map(len, sentences))
        assert shards.special_ids == SpecialIds(0, 1, 2, 3, 4)
        assert shards.tokens(0, 1).dtype == np.uint16
        assert pickle.loads(pickle.dumps(shards)).tokens(0, 1).tolist() == shards.tokens(0, 1).tolist()


def test_two_runs_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    prepare(make_recipe(tmp_path / "text"), tmp_path / "again", piece_bytes=2000)
    assert contents(tmp_path / "again") == contents(made)
    assert not list(tmp_path.glob("*.work"))


def test_processes_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    prepare(make_recipe(tmp_path / "text"), tmp_path / "again", num_workers=2, piece_bytes=2000)
    assert contents(tmp_path / "again") == contents(made)


def test_prepared_folder_is_left_as_it_is(made: Path, tmp_path: Path) -> None:
    before = (made / "manifest.json").stat().st_mtime_ns
    manifest, is_new = prepare(make_recipe(tmp_path / "text"), made, piece_bytes=2000)
    assert not is_new
    assert manifest == read_manifest(made)
    assert (made / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(MsltError, match="made from another recipe"):
        prepare(make_recipe(tmp_path / "text", validation_share=0.3), made)
    (tmp_path / "text/new.txt").write_text("Another file.")
    with pytest.raises(MsltError, match="made from another recipe or other source files"):
        prepare(make_recipe(tmp_path / "text"), made)


def test_a_folder_that_is_something_else_is_never_replaced(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    for inside in (text, text / "shards"):
        with pytest.raises(MsltError, match=r"lies inside of sources.0"):
            prepare(make_recipe(text), inside)
    assert (text / "000.txt").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(MsltError, match="is no shard folder"):
        prepare(make_recipe(text), tmp_path / "file")


def test_split_is_stable_when_sources_are_added() -> None:
    hashes = np.array([hash_text(make_text(i)) for i in range(2000)], np.uint64)
    held_out = choose_split(hashes, 0.1)
    assert 150 < held_out.sum() < 250
    assert choose_split(hashes, 0.2)[held_out].all()
    assert not choose_split(hashes, 0).any()


def test_nothing_left_is_an_error_and_makes_no_folder(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    with pytest.raises(MsltError, match=r"nothing is left for the train split \(42 documents: 1 empty, 41 short\)"):
        prepare(make_recipe(text, min_document_tokens=1000), tmp_path / "out")
    with pytest.raises(MsltError, match=r"validation_share: .*raise it"):
        prepare(make_recipe(text, validation_share=1e-9), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepare(make_recipe(text), tmp_path / "out")[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text"]


def test_damaged_documents_are_counted(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    (text / "binary.txt").write_bytes(b"\0" * 100)
    (text / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    dropped = prepare(make_recipe(text), tmp_path / "out")[0].sources[0].dropped
    assert (dropped["damaged"].documents, dropped["damaged"].bytes) == (2, 107)


def test_repeated_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    long = " ".join(make_text(index) for index in range(100, 110))
    (text / "long.txt").write_text(long)
    (text / "long-near.txt").write_text(long + " One more sentence.")
    (text / "long-same.txt").write_text(f"\n{long}\n\n")
    source = prepare(make_recipe(text), tmp_path / "out")[0].sources[0]
    counts = {rule: amount.documents for rule, amount in source.dropped.items()}
    assert counts == {"empty": 1, "short": 1, "exact_duplicate": 1, "near_duplicate": 1}
    assert source.kept.documents == 41
    without = make_recipe(text, duplicates={"exact": False, "near": False})
    assert prepare(without, tmp_path / "all")[0].sources[0].kept.documents == 43


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work/thesis.txt").write_text("x")
    with pytest.raises(MsltError, match=r"out\.work: is in the way"):
        prepare(make_recipe(text), tmp_path / "out")
    assert (tmp_path / "out.work/thesis.txt").read_text() == "x"


def test_the_way_a_path_is_written_does_not_alter_the_corpus(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(make_recipe(Path("text")), Path("again"), piece_bytes=2000)[0].hash == read_manifest(made).hash


def test_a_title_that_looks_like_a_path_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    pages = [
        f"<page><title>../../{index}</title><ns>0</ns><revision><text>{make_text(index)}</text></revision></page>"
        for index in range(20)
    ]
    (tmp_path / "dump/x.xml").write_text(f"<mediawiki>{''.join(pages)}</mediawiki>")
    sources = [{"kind": "wikipedia", "path": str(tmp_path / "dump")}]
    manifest, _ = prepare(make_recipe(tmp_path, sources=sources), tmp_path / "out")
    assert manifest.sources[0].kept.documents == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump", "out"]


def test_a_pretrained_tokenizer_is_taken_as_it_is(made: Path, tmp_path: Path) -> None:
    odd = Tokenizer.from_file(str(made / "tokenizer/tokenizer.json"))
    odd.normalizer = BertNormalizer(lowercase=True, strip_accents=False)
    odd.add_tokens(["covid19x"])
    odd.enable_truncation(4)
    (tmp_path / "odd").mkdir()
    odd.save(str(tmp_path / "odd/tokenizer.json"))
    recipe = make_recipe(tmp_path / "text", vocabulary={"pretrained": str(tmp_path / "odd")})
    manifest, _ = prepare(recipe, tmp_path / "out")
    stored = Tokenizer.from_file(str(tmp_path / "out/tokenizer/tokenizer.json"))
    odd.no_truncation()
    assert stored.encode("Été covid19x").ids == odd.encode("Été covid19x").ids
    assert manifest.tokenizer.vocab_size == read_manifest(made).tokenizer.vocab_size + 1
    Tokenizer(Unigram()).save(str(tmp_path / "odd/tokenizer.json"))
    with pytest.raises(MsltError, match="is a Unigram tokenizer"):
        prepare(recipe, tmp_path / "other")


def test_verify_checks_the_tokenizer_and_the_sums(made: Path) -> None:
    vocabulary = made / "tokenizer/vocab.txt"
    text = vocabulary.read_text()
    vocabulary.write_text(text.swapcase())
    with pytest.raises(MsltError, match=r"vocab.txt: missing or changed"):
        verify(made)
    vocabulary.write_text(text)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["sources"][0]["read"]["documents"] += 1
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MsltError, match="read is not what was kept and dropped"):
        verify(made)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    with locked(tmp_path / "out.work"), pytest.raises(MsltError, match="another process prepares"):
        prepare(make_recipe(text), tmp_path / "out")


def test_without_validation(tmp_path: Path) -> None:
    text = make_sources(tmp_path / "text")
    manifest, _ = prepare(make_recipe(text, validation_share=0), tmp_path / "out")
    assert manifest.unigram_entropy_nats is None
    assert verify(tmp_path / "out")["validation"]["documents"] == 0
    with pytest.raises(MsltError, match="validation split is empty"):
        open_shards(tmp_path / "out", "validation")


def test_existing_vocabulary_keeps_its_ids(made: Path, tmp_path: Path) -> None:
    vocabulary = {"file": str(made / "tokenizer/vocab.txt")}
    prepare(make_recipe(tmp_path / "text", vocabulary=vocabulary), tmp_path / "given", piece_bytes=2000)
    assert read_manifest(tmp_path / "given").tokenizer == read_manifest(made).tokenizer
    ours, given = open_shards(made, "train"), open_shards(tmp_path / "given", "train")
    assert ours.tokens(0, 3).tolist() == given.tokens(0, 3).tolist()
    pretrained = {"pretrained": str(made / "tokenizer")}
    assert prepare(make_recipe(tmp_path / "text", vocabulary=pretrained), tmp_path / "folder", piece_bytes=2000)[1]
    assert contents(tmp_path / "folder").keys() == contents(tmp_path / "given").keys()
    assert open_shards(tmp_path / "folder", "train").tokens(0, 3).tolist() == ours.tokens(0, 3).tolist()


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    with write_shard(tmp_path / "train-00000.arrow", 70_000) as writer:
        writer.add([[69_999, 1], [2]])
    entry = shard_entry(tmp_path / "train-00000.arrow", writer)
    assert entry.tokens == 3
    assert count_tokens(tmp_path, [entry], 70_000)[69_999] == 1


def test_unigram_cross_entropy_by_hand() -> None:
    # Train 3 × a, 0 × b: p = 4/5, 1/5; validation a, b.
    expected = -(np.log(0.8) + np.log(0.2)) / 2
    assert unigram_cross_entropy(np.array([3, 0]), np.array([1, 1])) == pytest.approx(expected, abs=1e-8)


def test_all_mistakes_of_a_recipe_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources:\n  - {kind: books}\n  - {kind: blogs, path: x}\n"
        "  - {kind: text, path: x, colour: red}\n  - {path: x}\n"
        "vocabulary: {size: 10, file: v.txt, lowercse: true}\nvalidation_shar: 0.1\n"
    )
    with pytest.raises(MsltError) as caught:
        validate(DataRecipe, read_yaml(path), str(path))
    for said in (
        "sources.0: a source of kind books needs a path",
        "sources.1.kind: 'blogs' is none of",
        "sources.2.colour: unknown key",
        "sources.3.kind: missing",
        "vocabulary.size",
        "vocabulary.lowercse: unknown key",
        "validation_shar: unknown key",
    ):
        assert said in str(caught.value)
    for vocabulary, said in [
        ({"file": "v", "size": 512}, "leave out size"),
        ({"pretrained": "v", "lowercase": True}, "leave out lowercase"),
        ({"file": "v", "pretrained": "w"}, "not both"),
        ({"size": 10**12}, "vocabulary.size"),
    ]:
        with pytest.raises(MsltError, match=said):
            validate(DataRecipe, {"sources": [{"kind": "python_docs"}], "vocabulary": vocabulary}, "r")
    twice = {"sources": [{"kind": "text", "path": "x"}, {"kind": "books", "path": "x"}, {"kind": "text", "path": "x"}]}
    with pytest.raises(MsltError, match="source 2 is source 0 again"):
        validate(DataRecipe, twice, "r")
    path.write_text("a: [")
    with pytest.raises(MsltError, match="not readable as YAML"):
        read_yaml(path)


def test_verify_finds_what_the_size_does_not_show(made: Path) -> None:
    assert verify(made)["train"]["documents"] == open_shards(made, "train").num_documents
    path = made / "train-00000.arrow"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    read_manifest(made)
    with pytest.raises(MsltError, match=r"train-00000.arrow: sha256"):
        verify(made)


def test_verify_finds_a_token_beyond_the_vocabulary(made: Path) -> None:
    with write_shard(made / "train-00000.arrow", 1000) as writer:
        writer.add([[5, 999]])
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0] = shard_entry(made / "train-00000.arrow", writer).model_dump(mode="json")
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MsltError, match="token id 999, the vocabulary has"):
        verify(made)


def test_damaged_folders_are_refused(made: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(made, tmp_path / name))

    with pytest.raises(MsltError, match="no such folder"):
        open_shards(tmp_path / "nowhere", "train")
    folder = damaged("unfinished")
    (folder / "manifest.json").unlink()
    with pytest.raises(MsltError, match=r"no finished shard folder; .*mslt data prepare"):
        open_shards(folder, "train")
    folder = damaged("missing")
    (folder / "train-00001.arrow").unlink()
    with pytest.raises(MsltError, match=r"train-00001.arrow: missing"):
        open_shards(folder, "validation")
    folder = damaged("truncated")
    path = folder / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MsltError, match=r"train-00000.arrow: \d+ bytes, the manifest says"):
        open_shards(folder, "train")
    folder = damaged("overwritten")
    path = folder / "train-00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(MsltError, match=r"train-00000.arrow: not a readable shard"):
        open_shards(folder, "train")
    folder = damaged("tokenizer")
    path = folder / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(MsltError, match=r"shards were made with another tokenizer: sha256 .*restore the tokenizer"):
        open_shards(folder, "train")
    path.unlink()
    with pytest.raises(MsltError, match=r"tokenizer.json: missing"):
        open_shards(folder, "train")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 99}, "format version 99, this mslt reads 2; upgrade"),
        ({"splits": {"train": {"documents": "many"}}}, "splits.train.documents"),
        ({"splits": {}}, "splits.train is missing"),
    ],
)
def test_manifest_that_cannot_be_read(made: Path, change: dict[str, Any], said: str) -> None:
    path = made / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MsltError, match=said):
        read_manifest(made)
    path.write_text("{")
    with pytest.raises(MsltError, match="not JSON"):
        read_manifest(made)


def test_manifest_hash_changes_with_the_corpus(made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest.hash == read_manifest(made).hash
    assert manifest.model_copy(update={"recipe_sha256": "0"}).hash != manifest.hash
    assert manifest.model_copy(update={"provenance": {}}).hash == manifest.hash


def test_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def interrupted() -> None:
        with whole_folder(out) as folder:
            (folder / "half.arrow").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == [out]
    assert not any(out.iterdir())
