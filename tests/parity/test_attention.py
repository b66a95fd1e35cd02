"""`mslt attention`: beside what transformers returns of the same model, and what it says of what cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import jensenshannon
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from mslt.cli.attention import read_sentences
from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate.attention import compare, open_encoder, parse_layers, summarize, text_maps
from mslt.report.attention import draw_maps
from tests.checkpoints import write

CPU = torch.device("cpu")
TEXT = "The import statement finds a $module$, then binds it."
SENTENCES = [TEXT, "A name.", "Return the value of the named attribute of object; this is a string.", "Done, or not"]


@pytest.fixture(scope="module")
def tokenizer(shards: Path) -> Path:
    return shards / "tokenizer"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return write(tmp_path_factory.mktemp("bert") / "bert", tokenizer, "BertForPreTraining")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Two layers of another width, and as many heads."""
    return write(tmp_path_factory.mktemp("other") / "other", tokenizer, "BertModel", 1, hidden_size=16,
                 num_hidden_layers=2)  # fmt: skip


def attention(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["attention", *map(str, arguments)], catch_exceptions=False)


def refused(*arguments: str | Path) -> str:
    with pytest.raises(MsltError) as refusal:
        attention(*arguments)
    return str(refusal.value)


@torch.no_grad()
def hugging_faces(folder: Path, text: str) -> Any:
    encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model(**encoded, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("model_class", ["BertModel", "BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_maps_are_what_transformers_returns(tmp_path: Path, tokenizer: Path, model_class: str) -> None:
    folder = write(tmp_path / "model", tokenizer, model_class)
    maps = text_maps(open_encoder(f"{folder}@2,0", CPU), TEXT)
    theirs = hugging_faces(folder, TEXT).attentions
    assert maps.layers == (2, 0)
    assert maps.tokens[0] == "[CLS]"
    assert len(maps.tokens) == theirs[0].shape[-1] > 10
    assert maps.is_special_T.nonzero().flatten().tolist() == [0, len(maps.tokens) - 1]
    for index, layer in enumerate(maps.layers):
        assert torch.equal(maps.weights_LHTT[index], theirs[layer][0])
    assert maps.weights_LHTT.std() > 0.02


def test_json_holds_all_that_the_picture_shows(bert: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "maps.png"
    done = attention(f"{bert}@1-2", bert, "--text", TEXT, "--head", "3", "--json", "--picture", picture)
    told = json.loads(done.stdout)
    assert told["text"] == TEXT
    assert [found["checkpoint"] for found in told["checkpoints"]] == [f"{bert}@1-2", str(bert)]
    theirs = hugging_faces(bert, TEXT).attentions
    for found, layers in zip(told["checkpoints"], [(1, 2), (0, 1, 2)], strict=True):
        assert [(shown["layer"], shown["head"]) for shown in found["maps"]] == [(layer, 3) for layer in layers]
        for shown in found["maps"]:
            assert torch.equal(torch.tensor(shown["weights"]), theirs[shown["layer"]][0, 3])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in picture.parent.iterdir()] == ["maps.png"]
    assert pyplot.get_fignums() == []


def test_the_table_says_where_heads_look(bert: Path) -> None:
    shown = attention(f"{bert}@0", "--text", TEXT, "--head", "all").stdout
    assert "to special tokens" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "bits" in line]
    assert [row[2] for row in rows if row[2]] == ["0", "1", "2", "3"]


def test_summary_of_a_head_worked_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0], [0, 0, 1, 0]])
    told = summarize(weights, torch.tensor([True, False, False, True]))
    assert told["entropy_bits"] == pytest.approx((1 + 2 + 0 + 0) / 4)
    assert told["itself"] == pytest.approx((0.5 + 0.25 + 1 + 0) / 4)
    assert told["neighbours"] == pytest.approx((0.5 + 0.5 + 0 + 1) / 4)
    assert told["special"] == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Figures as they were when they were closed."""
    figures: list[Figure] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def test_the_papers_figure_has_a_row_for_each_argument(
    bert: Path, other: Path, tmp_path: Path, drawn: list[Figure]
) -> None:
    texts = [text_maps(open_encoder(argument, CPU), TEXT) for argument in (f"{bert}@2,1", f"{bert}@0", str(other))]
    draw_maps(texts, 1, tmp_path / "maps.png")
    shown = [axes for axes in drawn[0].axes if axes.get_visible() and axes.images]
    assert [axes.get_title() for axes in shown] == [f"layer {layer}, head 1" for layer in (2, 1, 0, 0, 1)]
    places = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    for axes, (row, column) in zip(shown, places, strict=True):
        assert np.array_equal(axes.images[0].get_array(), texts[row].weights_LHTT[column, 1].numpy())
    assert [label.get_text() for label in shown[0].get_yticklabels()] == texts[0].tokens
    assert [label.get_text() for label in shown[3].get_xticklabels()] == texts[0].tokens
    assert not shown[0].get_xticklabels()
    names = [text.get_text() for axes in shown for text in axes.texts]
    assert [name.split("/")[-1] for name in names] == ["bert@2,1", "bert@0", "other"]
    assert "count from 0" in drawn[0].get_suptitle()


def test_all_heads_have_a_row_for_each_layer(bert: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    maps = text_maps(open_encoder(f"{bert}@1-2", CPU), TEXT)
    draw_maps([maps], None, tmp_path / "maps.png")
    titles = [axes.get_title() for axes in drawn[0].axes if axes.images]
    assert titles == [f"layer {layer}, head {head}" for layer in (1, 2) for head in range(4)]


def test_a_text_too_long_is_cut_and_said(bert: Path, tmp_path: Path) -> None:
    done = attention(f"{bert}@0", "--text", "name " * 400, "--json", "--picture", tmp_path / "maps.png")
    assert "has positions for 32 tokens; what follows is left out" in done.stderr
    tokens = json.loads(done.stdout)["checkpoints"][0]["tokens"]
    assert len(tokens) == 32
    assert tokens[-1] == "[SEP]"


def likeness_of(first: str, second: str, batch_size: int = 2, measures: Any = ("js", "cka")) -> Any:
    encoders = [open_encoder(argument, CPU) for argument in dict.fromkeys((first, second))]
    return compare(encoders[0], encoders[-1], SENTENCES, batch_size, measures, lambda done, total: None)


def test_likeness_is_that_of_sentences_one_by_one(bert: Path, other: Path) -> None:
    """scipy's distance of transformers' attention, and the centred products of transformers' hidden states."""
    found = likeness_of(str(bert), f"{other}@1,0", batch_size=3)
    outputs = [[hugging_faces(folder, text) for text in SENTENCES] for folder in (bert, other)]
    num_tokens = sum(out.attentions[0].shape[-1] for out in outputs[0])
    assert found.num_tokens == num_tokens
    for i, j in np.ndindex(3, 2):
        distances = [
            jensenshannon(one.attentions[i][0].double(), two.attentions[1 - j][0].double(), base=2, axis=-1).mean(0)
            for one, two in zip(*outputs, strict=True)
        ]
        assert found.js_LK[i, j].item() == pytest.approx(np.concatenate(distances).mean(), abs=1e-6)

    def centred(outs: list[Any], k: int) -> torch.Tensor:
        h_ND = torch.cat([out.hidden_states[k][0] for out in outs]).double()
        return h_ND - h_ND.mean(0)

    for i, (j, k) in [(i, column) for i in range(4) for column in enumerate((0, 2, 1))]:
        x_ND, y_NE = centred(outputs[0], i), centred(outputs[1], k)
        expected = (y_NE.T @ x_ND).norm() ** 2 / (x_ND.T @ x_ND).norm() / (y_NE.T @ y_NE).norm()
        assert found.cka[i, j].item() == pytest.approx(expected.item(), abs=1e-5)  # padding changes fp32's rounding


def test_a_checkpoint_is_nothing_apart_from_itself(bert: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bert, tmp_path / "copied")
    for second in (bert, copied):
        found = likeness_of(str(bert), str(second))
        assert not found.js_LK.diagonal().any()
        assert found.js_LK[0, 1] > 0.05
        assert found.cka.diagonal().numpy() == pytest.approx(1, abs=1e-12)
    chosen = likeness_of(f"{bert}@0-1", f"{bert}@1-2")
    assert chosen.js_LK[1, 0] == 0
    assert chosen.js_LK[0, 0] == pytest.approx(found.js_LK[0, 1])


def test_neither_batches_nor_padding_count(bert: Path, other: Path) -> None:
    alone, together = (likeness_of(str(bert), str(other), batch_size) for batch_size in (1, 4))
    assert alone.js_LK.numpy() == pytest.approx(together.js_LK.numpy(), abs=1e-6)
    assert alone.cka.numpy() == pytest.approx(together.cka.numpy(), abs=1e-5)
    assert alone.num_tokens == together.num_tokens


def test_corpus_command(bert: Path, other: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    corpus, picture = tmp_path / "corpus.txt", tmp_path / "likeness.png"
    corpus.write_text("\n\n".join(SENTENCES) + "\n" + "name " * 99 + "\nnever read\n")
    done = attention(bert, other, "--corpus", corpus, "--max-sentences", "5", "--json", "--picture", picture)
    told = json.loads(done.stdout)
    assert told["checkpoints"] == [str(bert), str(other)]
    assert (told["sentences"], told["cut"], told["layers"]) == (5, 1, [[0, 1, 2], [0, 1]])
    assert "1 of 5 sentences: cut" in done.stderr
    assert np.shape(told["js_distance"]) == (3, 2)
    assert np.shape(told["cka"]) == (4, 3)
    assert told["hidden_states"] == [[0, 1, 2, 3], [0, 1, 2]]
    assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")
    js, cka = (axes for axes in drawn[0].axes if axes.get_title())
    assert js.images[0].get_array().tolist() == told["js_distance"]
    assert cka.images[0].get_array().tolist() == told["cka"]
    assert [label.get_text() for label in cka.get_yticklabels()] == ["emb", "0", "1", "2"]
    assert [label.get_text() for label in js.get_xticklabels()] == ["0", "1"]

    shown = attention(bert, other, "--corpus", corpus, "--measure", "js").stdout
    assert "JS distance to the same" in " ".join(shown.split())
    assert "CKA" not in shown
    for layer in (0, 1):
        assert f"{told['js_distance'][layer][layer]:.4f}"[:4] in shown
    alone = attention(bert, "--corpus", corpus, "--max-sentences", "2").stdout
    assert "its own other layers" in alone
    assert "0.0000" not in alone


def test_a_state_that_does_not_vary_is_null(tmp_path: Path, tokenizer: Path) -> None:
    still = write(tmp_path / "still", tokenizer, "BertModel")
    save_file({name: 0 * tensor for name, tensor in load_file(still / "model.safetensors").items()},
              still / "model.safetensors", {"format": "pt"})  # fmt: skip
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A name.\n")
    done = attention(still, "--corpus", corpus, "--json", "--picture", tmp_path / "likeness.png")
    assert json.loads(done.stdout)["cka"][1][1] is None
    assert attention(still, "--corpus", corpus).exit_code == 0


@pytest.mark.parametrize(
    ("written", "layers"), [("0", (0,)), ("6-11", tuple(range(6, 12))), ("3, 0-1,3", (3, 0, 1, 3))]
)
def test_layers_as_written(written: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(written, 12, "x") == layers


@pytest.mark.parametrize("written", ["", "a", "-1", "3-", "5-3", "1,,2", "0-1-2", "²", "1.5"])
def test_what_names_no_layers(written: str) -> None:
    with pytest.raises(MsltError, match="is no layer or range of layers; write like @6-11"):
        parse_layers(written, 12, f"x@{written}")


def test_a_folder_may_have_the_sign_in_its_name(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert@home")
    assert open_encoder(str(folder), CPU).layers == (0, 1, 2)
    assert open_encoder(f"{folder}@1", CPU).layers == (1,)


def test_bad_arguments(bert: Path, other: Path, tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("One.\n")
    assert "give either --text SENTENCE or --corpus FILE" in refused(bert)
    assert "give either --text SENTENCE or --corpus FILE" in refused(bert, "--text", "a", "--corpus", corpus)
    assert "--measure is for --corpus; leave it out" in refused(bert, "--text", "a", "--measure", "js")
    assert "--head is for --text; leave it out" in refused(bert, "--corpus", corpus, "--head", "1")
    assert "3 checkpoints: with --corpus give two" in refused(bert, bert, other, "--corpus", corpus)
    assert "there is no layer 3; it has 3, 0 to 2" in refused(f"{bert}@1-3", "--text", "a")
    assert "has heads 0 to 3; give one of them, or all" in refused(bert, "--text", "a", "--head", "4")
    assert "has heads 0 to 3" in refused(bert, "--text", "a", "--head", "-1")
    assert "holds no token" in refused(bert, "--text", "  \n")
    assert "is a folder; name the file" in refused(bert, "--text", "a", "--picture", tmp_path)
    assert "not readable as UTF-8" in refused(bert, "--corpus", tmp_path / "none.txt")
    corpus.write_text("\n \n")
    assert "holds no sentence" in refused(bert, "--corpus", corpus)
    corpus.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MsltError, match="not readable as UTF-8"):
        read_sentences(corpus, 5)


def test_bad_checkpoints(bert: Path, other: Path, tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("One.\n")
    assert "no model folder (it has no config.json)" in refused(tmp_path, "--text", "a")
    bare = shutil.copytree(bert, tmp_path / "bare")
    for file in tokenizer.iterdir():
        (bare / file.name).unlink()
    assert "holds no tokenizer" in refused(bare, "--text", "a")
    torn = shutil.copytree(bert, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    assert f"{torn}: no weights that transformers can open" in refused(torn, "--text", "a")
    deeper = shutil.copytree(bert, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert "lacks weights of its encoder (encoder.layer.3." in refused(deeper, "--text", "a")
    (deeper / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type gpt2 is not supported; take one of bert, roberta, electra" in refused(deeper, "--text", "a")
    (deeper / "config.json").write_text("{")
    assert f"{deeper}: no checkpoint that transformers can open" in refused(deeper, "--text", "a")

    lost = shutil.copytree(bert, tmp_path / "lost")
    tensors = load_file(lost / "model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, lost / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    assert f"{lost}: what it computes is not finite" in refused(lost, "--text", "a")

    fewer = write(tmp_path / "fewer", tokenizer, "BertModel", num_attention_heads=2)
    message = refused(bert, fewer, "--corpus", corpus)
    assert "have 4 and 2 heads, so that no head has its fellow" in message
    assert "--measure cka" in message
    assert attention(bert, fewer, "--corpus", corpus, "--measure", "cka").exit_code == 0

    words = shutil.copytree(bert, tmp_path / "words")
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text.replace('"the"', '"tha"'))
    assert "have different vocabularies (512 and 512 entries, 2 unlike: 'tha' is missing in the one" in refused(
        bert, words, "--corpus", corpus
    )
    cased = shutil.copytree(bert, tmp_path / "cased")
    config = json.loads((cased / "tokenizer_config.json").read_text())
    (cased / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": False}))
    assert "their tokenizers cut the text into unlike tokens" in refused(bert, cased, "--corpus", corpus)
    assert attention(bert, words, "--text", "a").exit_code == 0
