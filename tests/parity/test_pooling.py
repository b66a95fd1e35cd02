"""Heads on hidden states beside the paper's arithmetic in plain torch: A1, A4 and A5 of the specification, and what a
head's file is loaded onto."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, pad
from transformers import BertConfig, BertModel

from mslt.errors import MsltError
from mslt.heads.pooling import (
    HeadSettings,
    PoolingHead,
    backbone_of,
    load_head,
    loss_of,
    new_head,
    num_parameters,
    project_together,
    save_head,
    sizes_of,
)
from tests.exits import KINDS, batch, classifier
from tests.pooling import D, L, head, packed, settings, states

BASE, LARGE = (768, 12, 3072, 12), (1024, 24, 4096, 16)


def bert(shape: tuple[int, int, int, int]) -> BertModel:
    width, num_layers, intermediate, num_heads = shape
    with torch.device("meta"):
        return BertModel(BertConfig(hidden_size=width, num_hidden_layers=num_layers, intermediate_size=intermediate,
                                    num_attention_heads=num_heads))  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "num_tokens", "adapter_width", "num_labels", "skip", "parameters", "ratio"),
    [
        (BASE, 128, 128, 2, False, 524_418, 208.77), (BASE, 128, 8, 2, False, 32_778, 3340),
        (BASE, 128, 16, 2, False, 65_554, 1670), (BASE, 128, 32, 2, False, 131_106, 835),
        (BASE, 128, 64, 2, False, 262_210, 418), (BASE, 128, 128, 1, False, 311_425, 352),
        (BASE, 128, 128, 3, False, 737_411, 148), (BASE, 250, 250, 2, False, 1_817_252, 60),
        (BASE, 250, 8, 2, False, 58_154, 1883), (BASE, 0, 384, 2, False, 305_282, 357),
        (LARGE, 128, 128, 2, False, 950_402, 353), (LARGE, 0, 384, 2, False, 412_802, 809),
        (LARGE, 0, 386, 2, True, 417_000, 801),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_the_specification_counts(
    shape: tuple[int, int, int, int], num_tokens: int, adapter_width: int, num_labels: int, skip: bool, parameters: int,
    ratio: float,
) -> None:  # fmt: skip
    """A1. `num_tokens` 0 is a head for spans; of these the specification divides BERT with its pooler, which a model
    that answers with spans has not."""
    model = bert(shape)
    chosen = HeadSettings("adapter", shape[0], 0, shape[1], num_labels, adapter_width, num_tokens=num_tokens,
                          tokens="flatten" if num_tokens else "each", skip=skip)  # fmt: skip
    with torch.device("meta"):
        counted = sum(p.numel() for p in new_head(chosen, model, 0).parameters())
    assert num_parameters(chosen) == counted == parameters
    sizes = sizes_of(chosen, model)
    assert sizes.ratio == pytest.approx(ratio, abs=0.6 if ratio > 300 else 0.5)
    assert sizes.deployed == sizes.whole + parameters
    assert sizes.task_bytes == 4 * parameters


def test_the_four_numbers_of_the_papers_209() -> None:
    """The ratio leaves the encoder out; what is deployed is 100.5 % of it. Cut to six layers it is less."""
    sizes = sizes_of(HeadSettings("adapter", 768, 0, 12, 2, 128), bert(BASE))
    assert (sizes.whole, sizes.head, sizes.deployed) == (109_483_778, 524_418, 110_008_196)
    assert round(sizes.ratio, 2) == 208.77
    assert round(sizes.deployed / sizes.whole, 3) == 1.005
    cut = sizes_of(HeadSettings("adapter", 768, 1, 6, 2, 128), bert(BASE))
    assert cut.deployed == 109_483_778 - 6 * 7_087_872 + cut.head


@pytest.mark.parametrize("pooler", ["adapter", "unshared", "mix", "mean", "last"])
@pytest.mark.parametrize("tokens", ["flatten", "attention", "first", "each"])
def test_every_head_counts_as_its_formula(pooler: str, tokens: str) -> None:
    for width in (3, 0):
        if width or pooler in ("mix", "mean", "last"):
            made = head(kind=pooler, tokens=tokens, adapter_width=width, first_state=1)
            assert num_parameters(made.settings) == sum(p.numel() for p in made.parameters())


def test_the_adapter_is_the_papers() -> None:
    """compress_utils.py, with L before A in the flattened order."""
    inputs, made = batch(), head()
    h_LBTD, mask = states(classifier(), inputs), inputs["attention_mask"].bool()
    p = gelu(h_LBTD @ made.projections[0].weight.T + made.projections[0].bias)  # [L, B, T, A]
    p = (p * mask[None, :, :, None]).permute(1, 2, 0, 3).flatten(1)
    expected = p @ made.output.weight.T + made.output.bias
    torch.testing.assert_close(made(packed(h_LBTD, mask), mask), expected, rtol=0, atol=1e-5)
    labels = torch.arange(32) % 2
    torch.testing.assert_close(loss_of(made.settings, expected, labels), cross_entropy(expected, labels))


@pytest.mark.parametrize("skip", [False, True])
def test_spans_are_the_papers(skip: bool) -> None:
    inputs, made = batch(), head(tokens="each", skip=skip)
    h_LBTD, mask = states(classifier(), inputs), inputs["attention_mask"].bool()
    p = gelu(h_LBTD @ made.projections[0].weight.T + made.projections[0].bias).permute(1, 2, 0, 3).flatten(2)
    p = torch.cat([p, h_LBTD[-1]], 2) if skip else p
    expected = p @ made.output.weight.T + made.output.bias
    found = made(packed(h_LBTD, mask), mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)
    assert (found[~mask] == -torch.inf).all()
    ends = torch.stack([torch.zeros(32), torch.full((32,), 2)], 1).long()
    alone = expected.masked_fill(~mask[:, :, None], -torch.inf)
    by_hand = (cross_entropy(alone[..., 0], ends[:, 0]) + cross_entropy(alone[..., 1], ends[:, 1])) / 2
    torch.testing.assert_close(loss_of(made.settings, found, ends), by_hand)


def test_projections_of_their_own_by_hand() -> None:
    inputs, made = batch(), head(kind="unshared")
    h_LBTD, mask = states(classifier(), inputs), inputs["attention_mask"].bool()
    h_NLD = packed(h_LBTD, mask)
    by_hand = [gelu(h_NLD[:, k] @ made.projections[k].weight.T + made.projections[k].bias) for k in range(L)]
    torch.testing.assert_close(made.features(h_NLD), torch.cat(by_hand, 1), rtol=0, atol=1e-6)


def test_an_adapter_that_does_nothing_is_the_mean_of_the_states() -> None:
    """A5."""
    made = head(adapter_width=D)
    made.activation = nn.Identity()
    with torch.no_grad():
        made.projections[0].weight.copy_(torch.eye(D))
        made.projections[0].bias.zero_()
    h_NLD = torch.randn(7, L, D)
    mean_ND = made.features(h_NLD).view(7, L, D).mean(1)
    torch.testing.assert_close(mean_ND, h_NLD.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(head(kind="mean", adapter_width=0).features(h_NLD), mean_ND, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", range(L))
def test_a_mix_of_one_layer_is_that_layer_exactly(state: int) -> None:
    """A5."""
    made, h_NLD = head(kind="mix", adapter_width=0), torch.randn(7, L, D)
    torch.testing.assert_close(made.features(h_NLD), h_NLD.mean(1), rtol=0, atol=1e-6)  # before it is trained
    with torch.no_grad():
        made.weights_L.copy_(torch.where(torch.arange(L) == state, 1000.0, 0.0))
    assert torch.equal(made.features(h_NLD), h_NLD[:, state])


def test_a_mix_finds_the_one_state_that_tells_the_labels() -> None:
    """At the rate that heads are trained with, in 100 steps."""
    made = head(kind="mix", adapter_width=0, tokens="first")
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-4)
    mask = torch.ones(64, 1, dtype=torch.bool)
    for _ in range(100):
        h_NLD = torch.randn(64, L, D)
        loss = loss_of(made.settings, made(h_NLD, mask), (h_NLD[:, 3].sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights_L = made.layer_weights()
    assert int(weights_L.argmax()) == 3
    assert weights_L[3] > 0.5


@pytest.mark.parametrize("tokens", ["flatten", "attention", "first", "each"])
@pytest.mark.parametrize("pooler", ["adapter", "mix"])
def test_padding_changes_nothing_unless_it_is_kept(pooler: str, tokens: str) -> None:
    """A4."""
    model, made = classifier(), head(kind=pooler, tokens=tokens, num_tokens=32)
    inputs = batch()
    wide = {name: pad(tensor, (0, 9)) for name, tensor in inputs.items()}
    with torch.no_grad():
        found = [made(packed(states(model, given), given["attention_mask"].bool()), given["attention_mask"].bool())
                 for given in (inputs, wide)]  # fmt: skip
        every = [torch.ones_like(given["attention_mask"]).bool() for given in (inputs, wide)]
        kept = [made(packed(states(model, given), all_), all_)
                for given, all_ in zip((inputs, wide), every, strict=True)]  # fmt: skip
    if tokens == "each":
        found, kept = ([each[:, :20] for each in both] for both in (found, kept))
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[0][real], found[1][real], rtol=0, atol=1e-5)
        assert all((each[~real] == -torch.inf).all() for each in found)
        torch.testing.assert_close(kept[0][real], found[0][real], rtol=0, atol=1e-5)
        assert all(each.isfinite().all() for each in kept), "padding can be answered with"
        return
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    if tokens != "first":
        assert (kept[0] - kept[1]).abs().max() > 1e-3


def test_heads_projected_together_answer_as_each_alone() -> None:
    heads = [head(seed, adapter_width=width) for seed, width in enumerate((3, 8, 1))]
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    h_NLD = packed(states(classifier(), inputs), mask)
    for made, projected in zip(heads, project_together(heads, h_NLD), strict=True):
        torch.testing.assert_close(made(h_NLD, mask, projected), made(h_NLD, mask), rtol=0, atol=1e-5)


def test_a_state_that_is_left_out_counts_no_more() -> None:
    h_NLD, mask = torch.randn(12, L, D), torch.ones(3, 4, dtype=torch.bool)
    other = h_NLD.clone()
    other[:, 2] = 100.0
    for pooler in ("adapter", "unshared", "mix", "mean"):
        made = head(kind=pooler)
        torch.testing.assert_close(made(h_NLD, mask, without=2), made(other, mask, without=2))
        assert not torch.allclose(made(h_NLD, mask, without=2), made(h_NLD, mask))


def test_the_last_state_that_is_left_out_goes_from_beside_the_features_too() -> None:
    h_NLD = torch.randn(12, L, D)
    other = h_NLD.clone()
    other[:, -1] = 100.0
    for pooler in ("adapter", "unshared", "mix", "mean"):
        made = head(kind=pooler, tokens="each", skip=True)
        torch.testing.assert_close(made.features(h_NLD, None, L - 1), made.features(other, None, L - 1))
        assert torch.equal(made.features(h_NLD, None, 0)[:, -D:], h_NLD[:, -1])


def test_rows_longer_than_a_flattening_head_are_refused() -> None:
    h_NLD, mask = torch.randn(42, L, D), torch.ones(2, 21, dtype=torch.bool)
    with pytest.raises(MsltError, match="21 tokens: this head reads 20"):
        head()(h_NLD, mask)
    assert head(tokens="attention")(h_NLD, mask).shape == (2, 2)
    for tokens in ("flatten", "attention", "first", "each"):
        with pytest.raises(MsltError, match="21 tokens: this head reads padding"):
            head(tokens=tokens, pad_states="keep")(h_NLD, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_one_file_for_one_encoder(kind: str, tmp_path: Path) -> None:
    model = classifier(kind)
    made = new_head(settings(), model, seed=1)
    described = save_head(tmp_path, made, backbone_of(model), task="SST-2")
    assert described == json.loads((tmp_path / "head.json").read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["head.json", "head.safetensors"]
    assert (tmp_path / "head.safetensors").stat().st_size < 4 * num_parameters(made.settings) + 1000
    again = load_head(tmp_path, model)
    assert again.settings == made.settings
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert torch.equal(new_head(settings(), model, 1).output.weight, made.output.weight), "keyed"
    with torch.no_grad():  # another head of the model's own changes nothing
        model.classifier.out_proj.weight.add_(1) if kind != "Bert" else model.classifier.weight.add_(1)
    load_head(tmp_path, model)
    assert backbone_of(model)["backbone_sha256"] == backbone_of(model.base_model)["backbone_sha256"]


def test_another_encoder_and_damaged_files_are_refused(tmp_path: Path) -> None:
    model = classifier()
    save_head(tmp_path, new_head(settings(), model, 1), backbone_of(model))
    for other, said in (
        (classifier(seed=1), "a head of another encoder: weights"),
        (classifier(num_attention_heads=1), "another encoder: weights, or config"),
        (classifier(hidden_act="relu"), "another encoder: weights, or config"),
        (classifier(layer_norm_eps=1e-3), "another encoder: weights, or config"),
        (classifier(num_hidden_layers=3), "layers 4 there, 3 here"),
        (classifier(hidden_size=64), "width 32 there, 64 here"),
        (classifier("Roberta"), "kind bert there, roberta here"),
    ):
        with pytest.raises(MsltError, match=said):
            load_head(tmp_path, other)
    whole = (tmp_path / "head.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / "head.safetensors").write_bytes(damaged)
        with pytest.raises(MsltError, match="is not the file that"):
            load_head(tmp_path, model)
    (tmp_path / "head.safetensors").write_bytes(whole)
    described = json.loads((tmp_path / "head.json").read_text())
    for changes in ({"last_state": L - 2}, {"kind": "unshared"}, {"pad_states": "keep"}, {"adapter_width": "3"}):
        text = json.dumps({**described, "settings": {**described["settings"], **changes}})
        (tmp_path / "head.json").write_text(text)
        with pytest.raises(MsltError, match=r"is of other settings than head\.json says"):
            load_head(tmp_path, model)
    for made, said in ((head(last_state=7), "hidden states 0:7"), (PoolingHead(settings()), "cannot be read")):
        if said == "cannot be read":
            made.output = nn.Linear(1, 1)
        save_head(tmp_path, made, backbone_of(model))
        with pytest.raises(MsltError, match=said):
            load_head(tmp_path, model)
    for text in ("{", "[]", "{}"):
        (tmp_path / "head.json").write_text(text)
        with pytest.raises(MsltError, match="holds no head"):
            load_head(tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"last_state": 5}, "hidden states 0:5: this encoder has 0 .embeddings. to 4"),
        ({"first_state": 3, "last_state": 2}, "hidden states 3:2"),
        ({"first_state": -1}, "hidden states -1:4"),
        ({"adapter_width": 0}, "adapter width 0: the pooler adapter"),
        ({"adapter_width": -1, "kind": "mean"}, "or 0 to project nothing"),
        ({"tokens": "each", "num_labels": 3}, "a span has 2 ends|span has 2 ends"),
        ({"skip": True}, "skip: is of spans alone"),
    ],
)
def test_heads_that_cannot_be_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(MsltError, match=said):
        new_head(settings(**changes), classifier(), 0)
