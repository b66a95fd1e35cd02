"""P1: layers copied upwards, dropped and kept by `mslt grow`, bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.growth import copied_upwards, kept_layers, without_top
from mslt.models import families
from mslt.models.factory import own_state, read_model
from mslt.plan import Plan
from tests.encoders import write_encoder
from tests.unit.test_probe_commands import run_of

DEPTH = 5


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "in", num_hidden_layers=DEPTH)


def grow(encoder: Path, *options: str) -> Path:
    out = encoder.parent / "out"
    result = CliRunner().invoke(app, ["grow", str(encoder), str(out), *options])
    if isinstance(result.exception, MsltError):
        assert not out.exists()
        raise result.exception
    assert result.exception is None, result.output
    return out


def layers_are(encoder: Path, out: Path, sources: list[int]) -> None:
    before, grown = read_model(encoder), read_model(out)
    assert grown.config.num_hidden_layers == len(families.layers(grown)) == len(sources)
    for layer, source in zip(families.layers(grown), sources, strict=True):
        for (name, here), there in zip(
            layer.named_parameters(), families.layers(before)[source].parameters(), strict=True
        ):
            assert torch.equal(here, there), (name, source)
    pointers = [p.data_ptr() for layer in families.layers(grown) for p in layer.parameters()]
    assert len(set(pointers)) == len(pointers), "a copy has storage of its own"
    others = [name for name in own_state(before) if ".layer." not in name]
    assert all(torch.equal(own_state(before)[name], own_state(grown)[name]) for name in others)


def test_a_layer_is_copied_upwards(encoder: Path) -> None:
    layers_are(encoder, grow(encoder, "--copy", "2", "--to", "3,4"), [0, 1, 2, 2, 2])


def test_a_run_names_its_last_finished_stage(tmp_path: Path, tiny_plan: Plan) -> None:
    run = run_of(tmp_path / "run", tiny_plan)
    layers_are(run / "stage-2/model", grow(run, "--drop-top", "1"), [0, 1, 2])


def test_copies_may_go_right_above_the_top(encoder: Path) -> None:
    layers_are(encoder, grow(encoder, "--copy", "4", "--to", "5,6"), [0, 1, 2, 3, 4, 4, 4])


def test_without_its_top_a_model_says_what_its_hidden_state_was(encoder: Path) -> None:
    out = grow(encoder, "--drop-top", "2")
    layers_are(encoder, out, [0, 1, 2])
    whole, short = (AutoModel.from_pretrained(path).eval() for path in (encoder, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["the film was good .", "a sad book"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = whole(**batch, output_hidden_states=True).hidden_states
        assert torch.equal(short(**batch).last_hidden_state, hidden[DEPTH - 2])


def test_some_layers_are_kept(encoder: Path) -> None:
    layers_are(encoder, grow(encoder, "--keep", "0,2,4"), [0, 2, 4])


def test_forms_are_index_maps() -> None:
    assert copied_upwards(12, 9, (10, 11)) == (*range(10), 9, 9)  # the paper's layer 10 into 11 and 12
    assert copied_upwards(10, 9, (10, 11)) == (*range(10), 9, 9)
    assert without_top(12, 2) == tuple(range(10))
    assert kept_layers(12, (0, 2, 4)) == (0, 2, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--copy", "5", "--to", "3"], "--copy 5: the model has layers 0 to 4 only; name some of these"),
        (["--copy", "2", "--to", "6"], "--to 6: copies go onto layers 0 to 4, or right above them"),
        (["--copy", "2", "--to", "random"], "--to random: copies go onto layers 0 to 4"),
        (["--copy", "2"], "--copy and --to go together"),
        (["--drop-top", "2", "--to", "1"], "--copy and --to go together"),
        (["--drop-top", "5"], "--drop-top 5: would drop all layers of 5; give 1 to 4"),
        (["--drop-top", "9"], "would drop all layers of 5"),
        (["--drop-top", "0"], "--drop-top 0: drops nothing of 5"),
        (["--keep", "0,5"], "--keep 5: the model has layers 0 to 4 only"),
        (["--keep", "2,0"], "--keep 2,0: name each layer once, in order"),
        (["--keep", ""], "is no layer"),
        (["--sources", "0,7"], r"sources \[7\]: the model has layers 0 to 4 only"),
        (["--sources", "0", "--drop-top", "1"], "give one of --sources, --copy, --drop-top, --keep, and not --sources"),
        ([], "give one of --sources, --copy, --drop-top, --keep, and not none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(encoder: Path, options: list[str], said: str) -> None:
    with pytest.raises(MsltError, match=said):
        grow(encoder, *options)
