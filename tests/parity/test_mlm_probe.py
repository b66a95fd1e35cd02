"""P3: heads that read words back from frozen hidden states, what is hidden from them, and what stays as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, ElectraForMaskedLM

from mslt.errors import MsltError
from mslt.evaluate import mlm_probe
from mslt.evaluate.mlm_probe import (
    Settings,
    Windows,
    cut_windows,
    head_answers,
    heads_for,
    num_parameters,
    open_frozen,
    padded,
    plan_mlm,
    pretrained_head,
    probe_mlm,
    train_heads,
    walk_dropped,
)
from mslt.evaluate.opening import open_tokenizer
from mslt.heads.mlm_head import MlmHead, new_mlm_head, without_components
from mslt.models import families
from mslt.models.layer_stack import iter_hidden
from tests.encoders import KINDS, SHAPE, SPECIAL, WORDS, write_encoder

CPU = torch.device("cpu")
QUICK = Settings(steps=60, batch_size=8, max_tokens=16, learning_rate=0.01)


def passages(count: int = 40) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, size=draw.integers(4, 24))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_learn_and_nothing_else_does(tmp_path: Path, kind: str) -> None:
    source = str(write_encoder(tmp_path / kind, kind))
    model = open_frozen(source, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = cut_windows(open_tokenizer(source), passages(), QUICK)
    heads = heads_for(model, source, QUICK)
    width, embedding = model.config.hidden_size, families.words_of(model).embedding_dim
    assert {num_parameters(head) for head in heads} == {width * embedding + 3 * embedding + SHAPE["vocab_size"]}
    untrained, _ = head_answers(model, heads, windows, 8)
    train_heads(model, heads, windows, QUICK)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    right, asked = head_answers(model, heads, windows, 8)
    assert asked.tolist() == [len(words) for words in heldout_words(windows)]
    assert ((right.sum(1) - untrained.sum(1)) > 0.3 * asked.sum()).all(), right
    assert (right == head_answers(model, heads, windows, 3)[0]).all(), "padding says nothing"


def heldout_words(windows: Windows) -> list[list[int]]:
    """The ids of each held-out passage, from all its windows."""
    found: dict[int, list[int]] = {}
    for window, passage in zip(windows.heldout, windows.passage_of, strict=True):
        found.setdefault(passage, []).extend(token for token in window if token >= len(SPECIAL))
    return [found[passage] for passage in sorted(found)]


def test_windows_know_their_passage(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_encoder(tmp_path / "bert")))
    wide, narrow = (cut_windows(tokenizer, passages(), replace(QUICK, max_tokens=tokens)) for tokens in (32, 8))
    assert len(wide.heldout) == len(set(wide.passage_of))
    assert len(narrow.heldout) > len(wide.heldout)
    assert heldout_words(narrow) == heldout_words(wide)


def test_the_papers_count_of_parameters() -> None:
    for width, formula in ((768, 622_650), (384, 179_130)):
        config = KINDS["bert"][0](hidden_size=width, vocab_size=30_522)
        assert num_parameters(MlmHead(config, width, seed=0)) == formula


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_is_what_is_asked_for(tmp_path: Path, kind: str) -> None:
    source = str(write_encoder(tmp_path / kind, kind))
    model = open_frozen(source, CPU)
    windows = cut_windows(open_tokenizer(source), passages(), QUICK)
    ids_BT, mask_BT = padded(windows.train[:8], windows.pad_id)
    plain = [h_BTD for _, h_BTD in iter_hidden(model, ids_BT, None, mask_BT)]
    for dropout in (0.0, 0.5, 1.0):
        settings = replace(QUICK, dropout=dropout, chosen_share=0.3)
        chosen_BT, walk = walk_dropped(model, ids_BT, mask_BT, windows.is_special_V, settings, step=3)
        again_BT, _ = walk_dropped(model, ids_BT, mask_BT, windows.is_special_V, settings, step=3)
        other_BT, _ = walk_dropped(model, ids_BT, mask_BT, windows.is_special_V, settings, step=4)
        assert torch.equal(chosen_BT, again_BT)
        assert not torch.equal(chosen_BT, other_BT)
        assert not (chosen_BT & (ids_BT < len(SPECIAL))).any(), "special tokens and padding are never chosen"
        assert 0.15 < chosen_BT.sum() / (ids_BT >= len(SPECIAL)).sum() < 0.45
        hidden = [h_BTD for _, h_BTD in walk]
        if dropout == 0.0:
            assert all(torch.equal(here, there) for here, there in zip(hidden, plain, strict=True))
        else:
            changed_BT = (hidden[0] != plain[0]).any(-1)
            assert torch.equal(changed_BT, chosen_BT), "those and no others"
            assert not any(h_BTD.requires_grad for h_BTD in hidden)


def test_dropped_components_are_0_and_the_others_as_they_were() -> None:
    words = torch.randn(2, 3, 8)
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    dropped = torch.rand(3, 8) < 0.5
    found = without_components(words, chosen, dropped)
    assert torch.equal(found[~chosen], words[~chosen])
    assert (found[chosen][dropped] == 0).all()
    assert torch.equal(found[chosen][~dropped], words[chosen][~dropped]), "not rescaled"
    assert (without_components(words, chosen, torch.ones(3, 8).bool())[chosen] == 0).all()


@pytest.mark.parametrize(("kind", "activation"), [*((kind, "gelu") for kind in KINDS), ("bert", "relu")])
def test_a_pretrained_head_says_what_its_model_says(tmp_path: Path, kind: str, activation: str) -> None:
    source = str(write_encoder(tmp_path / kind, kind, hidden_act=activation))
    if kind == "electra":  # the generator has the head
        config = AutoModel.from_pretrained(source).config
        torch.manual_seed(0)
        ElectraForMaskedLM(config).save_pretrained(source)
    masked = AutoModelForMaskedLM.from_pretrained(source).eval()
    model = open_frozen(source, CPU)
    (*_, head) = heads_for(model, source, replace(QUICK, head="pretrained"))
    ids_BT = torch.randint(5, 20, (3, 9))
    with torch.no_grad():
        *_, (_, h_BTD) = iter_hidden(model, ids_BT, None, None)
        logits = head(h_BTD, families.words_of(model).weight)
        assert torch.allclose(logits, masked(ids_BT).logits, atol=1e-5)


def test_a_head_with_words_of_its_own_is_refused(tmp_path: Path) -> None:
    source = str(write_encoder(tmp_path / "bert", tie_word_embeddings=False))
    with pytest.raises(MsltError, match=r"its MLM head has words of its own, .* --mlm-head random"):
        pretrained_head(source)


def test_heads_begin_alike(tmp_path: Path) -> None:
    model = open_frozen(str(write_encoder(tmp_path / "bert")), CPU)
    one, same, other = (new_mlm_head(model, seed).dense.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_result_is_kept_and_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_encoder(tmp_path / "bert"))

    def probe(settings: Settings = QUICK, texts: list[str] | None = None) -> dict:
        planned = plan_mlm(source, texts or passages(), settings, tmp_path / "out")
        return probe_mlm(planned, CPU, lambda done, total: None)

    first = probe()
    monkeypatch.setattr(mlm_probe, "train_heads", lambda *rest: pytest.fail("it is done"))
    assert probe() == first
    for settings, texts, said in (
        (replace(QUICK, steps=7), None, "steps 60, now 7"),
        (replace(QUICK, dropout=1.2), None, "--dropout 1.2: is a probability"),
        (replace(QUICK, max_tokens=64), None, "--max-tokens 64: .* has 40 positions"),
        (replace(QUICK, dropout=0.9), ["one"], "1 passages are too few"),
        (
            replace(QUICK, dropout=0.9),
            ["xyz " * (n + 1) for n in range(40)],
            "or hold no word that the tokenizer knows",
        ),
    ):
        with pytest.raises(MsltError, match=said):
            probe(settings, texts)
    AutoModel.from_pretrained(source).save_pretrained(source)  # without its head
    with pytest.raises(MsltError, match=r"has no MLM head .* --mlm-head random"):
        probe(replace(QUICK, dropout=0.9, head="pretrained"))
