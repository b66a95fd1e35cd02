"""P7: all layers in one pass are what each pass gives, and probes trained together what each is alone, in SentEval's
own loop written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.probing import one_alone
from mslt.errors import MsltError
from mslt.evaluate import probe_features
from mslt.evaluate.probe_features import open_features, pooled_hidden, standardized, write_features
from mslt.heads.layer_probe import Features, ProbeTraining, train_probes
from tests.encoders import KINDS, write_encoder

L, D, C = 4, 12, 3
SPLITS = {"tr": np.arange(0, 300), "va": np.arange(300, 360), "te": np.arange(360, 420)}
TEXTS = ["the film was good .", "a sad book", "awful", "the book is great . a nice film is fine . the film was bad"]


@pytest.fixture(scope="module")
def data() -> tuple[Features, torch.Tensor]:
    """Labels that layers show more or less, and labels that none does."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, C, (420,), generator=draw)
    rows = torch.randn(420, L, D, generator=draw)
    for k in range(L):
        rows[:, k, :C] += 0.8 * k * nn.functional.one_hot(labels, C)
    features = Features(rows.half(), torch.ones(L, D), torch.zeros(L, D))
    return features, torch.stack([labels, labels[torch.randperm(420, generator=draw)]])


@pytest.mark.parametrize("num_hidden", [50, 0])
def test_probes_are_sentevals(data: tuple[Features, torch.Tensor], num_hidden: int) -> None:
    features, labels_KR = data
    training = ProbeTraining(num_hidden=num_hidden, max_epochs=60)
    together = train_probes(features, labels_KR, SPLITS, C, training, seed=3)
    for k in range(L):
        x_RD = features.rows_RLD[:, k].float()
        found = {l2: one_alone(x_RD, labels_KR[0], SPLITS, C, training, l2, seed=3) for l2 in training.l2}
        l2, (dev, right, epochs) = max(found.items(), key=lambda each: each[1][0])
        assert together.dev[0, k].item() == pytest.approx(dev, abs=0.005)
        assert (together.right[0, k] != right).sum() <= 1, "row by row"
        assert together.l2[0, k].item() == pytest.approx(l2)
        assert abs(together.epochs[0, k].item() - epochs) <= 4


def test_a_probe_does_not_know_of_the_others(data: tuple[Features, torch.Tensor]) -> None:
    features, labels_KR = data
    training = ProbeTraining(max_epochs=60)
    together = train_probes(features, labels_KR, SPLITS, C, training, seed=0)
    for k in range(L):
        for of, labels_R in enumerate(labels_KR):
            part = Features(features.rows_RLD[:, k : k + 1], features.scale_LD[:1], features.shift_LD[:1])
            alone = train_probes(part, labels_R[None], SPLITS, C, training, seed=0)
            for found in ("dev", "right", "l2", "epochs"):
                assert torch.equal(getattr(alone, found)[0, 0], getattr(together, found)[of, k]), (found, of, k)


def test_probes_know_what_is_there_and_nothing_else(data: tuple[Features, torch.Tensor]) -> None:
    found = train_probes(*data, SPLITS, C, ProbeTraining(l2=(1e-4,)), seed=0)
    real, control = found.right.float().mean(-1).tolist()
    assert real[-1] > 0.85
    assert all(share < 0.5 for share in (real[0], *control))
    assert (found.epochs <= 204).all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_what_hugging_face_gives_one_sentence_at_a_time(tmp_path: Path, kind: str, pooling: str) -> None:
    folder = write_encoder(tmp_path / "encoder", kind, num_hidden_layers=3)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    path = tmp_path / "features.npy"
    tokenizer.padding_side = "left"  # as some checkpoints say
    assert write_features(model, tokenizer, TEXTS, path, pooling, 16, lambda done, total: None) == 1
    features = open_features(path)
    assert features.rows_RLD.dtype == torch.float16
    kept_BLD = features.of(np.arange(len(TEXTS)))
    tokenizer.padding_side = "right"
    together = tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pooled_BLD = pooled_hidden(model, dict(together), pooling)
    for index, text in enumerate(TEXTS):
        alone = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            states = model(**alone, output_hidden_states=True).hidden_states
        expected_LD = torch.stack([h[0, 0] if pooling == "cls" else h[0].mean(0) for h in states])
        assert (pooled_BLD[index] - expected_LD).abs().max() <= 1e-6
        assert (kept_BLD[index] - expected_LD).abs().max() <= 2**-10 * (expected_LD.abs().max() + 1)
    if pooling == "cls":
        assert (kept_BLD[:, 0] == kept_BLD[:1, 0]).all(), "[CLS] of the embedding output is one vector"


def test_small_differences_of_large_features_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 has steps of 1/16 at 100."""
    folder = write_encoder(tmp_path / "encoder")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pooled_RLD = 100 + 1e-3 * torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "features.npy"

    def write() -> None:
        monkeypatch.setattr(probe_features, "pooled_hidden", lambda *rest: pooled_RLD)
        write_features(model, tokenizer, TEXTS, path, "cls", 16, lambda done, total: None)

    write()
    features = open_features(path)
    by_length = sorted(range(4), key=lambda index: len(TEXTS[index]))
    kept_RLD, expected_RLD = features.rows_RLD[by_length].double(), pooled_RLD.double()
    differences = expected_RLD - expected_RLD[:1]
    assert 1e-3 < differences.abs().max() < 1e-2
    assert (kept_RLD - kept_RLD[:1] - differences).abs().max() <= 2**-10 * differences.abs().max()
    assert (features.of(np.array(by_length)) - pooled_RLD).abs().max() <= 1 / 32
    for value in (1e5, float("nan")):
        pooled_RLD[2, 1, 0] = value
        with pytest.raises(MsltError, match=r"its hidden states are not finite in fp16 \(65,504 is the most\)"):
            write()


def test_standardized_features_have_mean_0_and_deviation_1(data: tuple[Features, torch.Tensor]) -> None:
    features, _ = data
    rows = features.rows_RLD.clone()
    rows[:, 0, 0] = 3.0  # says nothing
    x = standardized(Features(rows * 4 + 1, features.scale_LD, features.shift_LD), SPLITS["tr"]).of(SPLITS["tr"])
    assert x.mean(0).abs().max() < 1e-3
    assert (x.std(0).flatten()[1:] - 1).abs().max() < 0.01
    assert (x[:, 0, 0] == 0).all()


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    model = AutoModel.from_pretrained(write_encoder(tmp_path / "encoder"))
    with pytest.raises(MsltError, match=r"features of all layers take 0.0 GB, 0.0 GB are free; make room"):
        write_features(model, None, TEXTS, tmp_path / "features.npy", "cls", 16, lambda done, total: None)
    assert not (tmp_path / "features.npy").exists()


def test_what_a_killed_process_left_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_encoder(tmp_path / "encoder")
    left = [tmp_path / ".features.npy.tmp", tmp_path / "features.npy"]
    for path in left:
        path.write_bytes(b"half")
    there: list[bool] = []
    monkeypatch.setattr(
        probe_features, "refuse_full_disk", lambda path, num_bytes: there.extend(path.exists() for path in left)
    )
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    write_features(model, tokenizer, TEXTS, left[1], "cls", 16, lambda done, total: None)
    assert there == [False, False]
