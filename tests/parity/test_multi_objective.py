"""P2: fine-tuning beside masked words, with an extra layer that is left out afterwards; and Tables 1 and 2."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate import grid
from mslt.evaluate.fine_tune import FineTuning, fine_tune
from mslt.evaluate.multi_objective import MultiObjective, MultiObjectiveModel, multi_objective_model
from mslt.evaluate.opening import open_with_new_head
from mslt.files import write_json
from mslt.models import families
from mslt.report import paper
from mslt.report.surgery import Mean, Method, read_methods, surgery_tables
from tests.encoders import write_encoder
from tests.glue_files import write_glue

TEXTS = ["the film was good .", "the book was sad . a film", "awful", "a nice book is the great film ."]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def opened(encoder: Path, **settings: Any) -> tuple[MultiObjectiveModel, dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = open_with_new_head(str(encoder), AutoModelForSequenceClassification, seed=0)
    whole = multi_objective_model(model, str(encoder), tokenizer, MultiObjective(**settings), seed=0)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=torch.tensor([1, 0, 0, 1]))
    return whole, batch


def gradients(whole: MultiObjectiveModel, batch: dict[str, torch.Tensor]) -> set[str]:
    """Which parts got one, of a batch in training."""
    whole.train()
    torch.manual_seed(0)
    whole(**batch).loss.backward()
    names = {name for name, p in whole.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {name.split(".")[0 if not name.startswith("model.") else 1] for name in names}


@pytest.mark.parametrize("extra_layer", [False, True])
def test_each_objective_trains_its_own_parts(encoder: Path, extra_layer: bool) -> None:
    own = {"head"} | ({"extra"} if extra_layer else set())
    whole, batch = opened(encoder, extra_layer=extra_layer, mlm_share=0.0)
    assert gradients(whole, batch) == {"bert", "classifier"}
    whole, batch = opened(encoder, extra_layer=extra_layer, mlm_share=1.0, chosen_share=0.5)
    assert gradients(whole, batch) == {"bert"} | own
    pooler = families.pooler_of(whole.model)
    assert pooler is not None
    assert pooler.weight.grad is None
    whole, batch = opened(encoder, extra_layer=extra_layer, chosen_share=0.5)
    assert gradients(whole, batch) == {"bert", "classifier"} | own


@pytest.mark.parametrize("head", ["random", "pretrained"])
def test_a_drawn_head_learns_at_its_own_rate(encoder: Path, head: str) -> None:
    """One step of AdamW at its first moment moves what has a gradient by the rate."""
    whole, batch = opened(encoder, extra_layer=True, head=head, mlm_share=1.0, chosen_share=0.5)
    before = {name: tensor.detach().clone() for name, tensor in whole.named_parameters()}
    rows = list(range(len(TEXTS)))
    settings = FineTuning(1e-4, len(rows), 1, seed=0, warmup_share=0.0)
    list(fine_tune(whole, rows, lambda rows: {name: tensor[rows] for name, tensor in batch.items()}, settings,
                   whole.parts(1e-4)))  # fmt: skip
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in whole.named_parameters()}
    assert moved["head.dense.weight"] == pytest.approx(1e-3 if head == "random" else 1e-4, rel=0.05)
    assert max(much for name, much in moved.items() if not name.startswith("head.")) == pytest.approx(1e-4, rel=0.05)


def test_classifier_layer_and_head_are_clipped_apart(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, batch = opened(encoder, extra_layer=True)
    clipped: list[set[int]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def counted(parameters: list[torch.Tensor], most: float) -> torch.Tensor:
        clipped.append({id(parameter) for parameter in parameters})
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    rows = list(range(len(TEXTS)))
    list(fine_tune(whole, rows, lambda rows: {name: tensor[rows] for name, tensor in batch.items()},
                   FineTuning(1e-4, len(rows), 1, seed=0), whole.parts(1e-4)))  # fmt: skip
    assert whole.extra is not None
    assert clipped == [{id(p) for p in part.parameters()} for part in (whole.model, whole.extra, whole.head)]


def test_the_loss_is_both_and_each_of_its_own_samples(encoder: Path) -> None:
    """Without any dropout: half of it by hand."""
    whole, batch = opened(encoder, dropout=1.0, chosen_share=1.0)
    whole.train()
    for part in whole.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for attention in (part for part in whole.model.modules() if hasattr(part, "dropout_prob")):
        attention.dropout_prob = 0.0
    whole.model.config.attention_probs_dropout_prob = 0.0
    seed = next(seed for seed in range(99) if 0 < (torch.manual_seed(seed) and torch.rand(4) < 0.5).sum() < 4)
    torch.manual_seed(seed)
    is_mlm = torch.rand(4) < 0.5
    torch.manual_seed(seed)
    loss = whole(**batch).loss
    whole.eval()
    with torch.no_grad():
        labels = batch.pop("labels")
        logits = whole.model(**batch).logits
        expected = torch.nn.functional.cross_entropy(logits[~is_mlm], labels[~is_mlm])
        ids = batch["input_ids"]
        is_word = (ids >= 5) & is_mlm[:, None]
        words = families.words_of(whole.model).weight
        hidden = whole.model.base_model(
            inputs_embeds=words[ids].masked_fill(is_word[..., None], 0.0), attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
        ).last_hidden_state  # fmt: skip
        expected += torch.nn.functional.cross_entropy(whole.head(hidden[is_word], words), ids[is_word])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_without_the_extra_layer_it_says_the_same(encoder: Path, tmp_path: Path) -> None:
    whole, batch = opened(encoder, extra_layer=True)
    assert whole.extra is not None
    top = families.layers(whole.model)[-1]
    for mine, theirs in zip(whole.extra.parameters(), top.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    before = copy.deepcopy(whole.extra.state_dict())
    whole.train()
    for _ in range(5):
        optimizer.zero_grad()
        whole(**batch).loss.backward()
        optimizer.step()
    assert any(not torch.equal(before[name], tensor) for name, tensor in whole.extra.state_dict().items())
    whole.eval()
    whole.model.save_pretrained(tmp_path)
    ordinary = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert ordinary.config.num_hidden_layers == 2
    assert len(ordinary.state_dict()) == len(whole.model.state_dict())
    with torch.no_grad():
        assert torch.equal(ordinary(**batch).logits, whole(**batch).logits)


def test_regression_and_families(tmp_path: Path) -> None:
    for kind in ("roberta", "electra"):
        source = write_encoder(tmp_path / kind, kind)
        model = open_with_new_head(str(source), AutoModelForSequenceClassification, seed=0, num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(source)
        whole = multi_objective_model(
            model, str(source), tokenizer, MultiObjective(extra_layer=True, head="random"), seed=0
        )
        batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=torch.rand(4))
        assert gradients(whole, batch) >= {"classifier"}
        assert whole(**batch).loss.isfinite()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_glue_is_fine_tuned_so_and_stands_in_the_tables(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_process", lambda: ThreadPoolExecutor(1))
    data = write_glue(tmp_path / "glue")
    options = ["--data-dir", data, "--subset", "--preset", "convexity", "--task", "CoLA", "--task", "RTE", "--seeds", 1,
               "--epochs", 2, "--learning-rate", "3e-3", "--batch-size", 16, "--max-tokens", 16]  # fmt: skip
    out = {method: tmp_path / method for method in ("plain", "extra-layer")}
    assert run("evaluate", "glue", encoder, *options, "--out", out["plain"]).exit_code == 0
    result = run("evaluate", "glue", encoder, *options, "--extra-layer", "--save-models", "--out", out["extra-layer"])
    assert result.exit_code == 0, result.output
    (saved,) = (out["extra-layer"] / "models/CoLA").glob("*/config.json")
    assert AutoModelForSequenceClassification.from_pretrained(saved.parent).config.num_hidden_layers == 2
    settings = json.loads((out["extra-layer"] / "results.json").read_text())["settings"]
    assert settings["objective"]["extra_layer"] is True
    again = run("evaluate", "glue", encoder, *options, "--out", out["extra-layer"])
    assert "is the result of other settings" in str(again.exception)

    table = run("probe", "tables", *(f"{method}={folder}" for method, folder in out.items()), "--json")
    found = json.loads(table.stdout)
    assert "no method beats plain fine-tuning" in found["verdict"]
    first, second = found["tables"]
    assert [row[0] for row in first["rows"]] == ["ours", "ours", "paper", "paper", "paper", "paper"]
    assert set(first["rows"][0][2]) == {"CoLA", "RTE"}, "no average of a part"
    assert [each["num_seeds"] for each in first["rows"][0][2].values()] == [1, 1]
    assert first["rows"][2][2]["average"]["value"] == pytest.approx(75.85, abs=0.01)
    assert [row[0] for row in second["rows"]] == ["paper", "paper"], "another model's, where drop is not given"
    for exchanged, said in (
        ({"extra-layer": "plain"}, "extra-layer=.* was fine-tuned on labels alone, not on masked"),
        ({"plain": "extra-layer"}, "plain=.* on masked words with an extra layer, not on labels"),
        ({"multi-objective": "extra-layer"}, "extra layer, not on masked words; name the folder"),
    ):
        (given,) = (f"{method}={out[of]}" for method, of in exchanged.items())
        with pytest.raises(MsltError, match=said):
            raise run("probe", "tables", given).exception
    assert "no method beats" in run("probe", "tables").stdout


def test_what_cannot_be_is_refused(encoder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(encoder).save_pretrained(bare)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(bare)
    data = write_glue(tmp_path / "glue")
    glue = ["--data-dir", data, "--subset", "--preset", "quick", "--task", "CoLA", "--max-tokens", 16]
    for arguments, said in (
        ([encoder, *glue, "--multi-objective", "--extra-layer"], "give one"),
        ([encoder, *glue, "--mlm-head", "random"], "goes with --multi-objective or --extra-layer"),
        ([bare, *glue, "--extra-layer"], "has no MLM head"),
    ):
        assert said in str(run("evaluate", "glue", *arguments).exception)
    assert not (tmp_path / "bare-evaluation").exists()
    for arguments, said in (
        (["plain"], "write METHOD=FOLDER"),
        (["plan=x"], "did you mean plain"),
        ([f"plain={tmp_path}"], "holds no results.json of `mslt evaluate glue`"),
    ):
        assert said in str(run("probe", "tables", *arguments).exception)


def entry(rates: list[float], headline: str = "accuracy") -> dict[str, Any]:
    return {"best": "x", "headline": headline, "mean": 0.5, "deviation": 0.01, "headlines": [0.49, 0.5, 0.51],
            "protocol": {"learning_rates": rates}}  # fmt: skip


def test_methods_are_held_against_each_other_alike_alone(tmp_path: Path) -> None:

    def write(name: str, task: dict[str, Any], grown: dict[str, Any] | None = None, **settings: Any) -> Path:
        (tmp_path / name).mkdir()
        settings = {"max_train_rows": None, "checkpoint": "c", **settings}
        results = {"tasks": {"MRPC": task}, "settings": settings, "grown": grown}
        write_json(tmp_path / name / "results.json", results)
        return tmp_path / name

    grown = {"parent": "c", "layers": [0, 1, 1]}
    plain, copied = write("plain", entry([1e-5])), write("copied", entry([1e-5]), checkpoint="d", grown=grown)
    found = read_methods({"plain": plain, "copy": copied})
    assert found["copy"] == Method({"MRPC": Mean(50.0, 1.0, 3)}, "0-1,1")
    assert surgery_tables(found)[0].rows[1][:2] == ("ours", "copying last layers: 0-1,1")
    assert str(Mean(50.0, 1.0, 3)) == "50.00 ± 1.00"
    masked, more = ({"extra_layer": extra, "dropout": ratio} for extra, ratio in ((False, 0.3), (True, 0.5)))
    for method, other, said in (
        ("copy", write("rates", entry([2e-5]), grown=grown), "MRPC was fine-tuned otherwise than plain's"),
        ("copy", write("rows", entry([1e-5]), grown=grown, max_train_rows=100), "was fine-tuned otherwise than plain"),
        ("copy", write("not-grown", entry([1e-5])), "copy=.* is not of a checkpoint with a copy, but none of which"),
        ("drop", copied, "is not of a checkpoint with a drop, but one with a copy; fine-tune what `mslt grow` writes"),
        ("copy", write("short", entry([1e-5]), {**grown, "layers": [0, 1]}), "with a copy, but one with a drop"),
        ("copy", write("upside-down", entry([1e-5]), {**grown, "layers": [1, 0]}), "with a copy, but none of which"),
        ("copy", write("of-another", entry([1e-5]), {**grown, "parent": "e"}), "another checkpoint than plain's"),
        ("multi-objective", write("foreign", entry([1e-5]), checkpoint="e", objective=masked), "than plain's; begin"),
        ("plain", write("f1", entry([1e-5], "f1")), "MRPC is headed by f1, in the paper by accuracy"),
    ):
        with pytest.raises(MsltError, match=said):
            read_methods({"plain": plain, method: other})
    objectives = {"multi-objective": write("masked", entry([1e-5]), objective=masked),
                  "extra-layer": write("more", entry([1e-5]), objective=more)}  # fmt: skip
    with pytest.raises(MsltError, match=r"extra-layer=.* has its words masked .* otherwise than multi-objective's"):
        read_methods(objectives)
    tables = surgery_tables(read_methods({"plain": write("failed", {"best": None})}))
    assert all(whose == "paper" for table in tables for whose, _, _ in table.rows), "nothing of ours without a result"


def test_plain_fine_tuning_stands_beside_its_own_model() -> None:
    def ours(*methods: str) -> list[list[str]]:
        tables = surgery_tables({method: Method({"RTE": Mean(50.0)}) for method in methods})
        return [[name for whose, name, _ in table.rows if whose == "ours"] for table in tables]

    assert ours("plain") == [["fine-tuned"], []]
    assert ours("plain", "copy") == [["fine-tuned", "copying last layers"], []]
    assert ours("plain", "drop") == [[], ["fine-tuned", "dropping last two layers"]]


def test_the_papers_averages_are_what_its_rows_say() -> None:
    averages = {row.name: sum(row.scores.values()) / 4 for rows in paper.SURGERY.values() for row in rows}
    for name, reported in (("multi-objective", 75.83), ("multi-objective + extra layer", 75.35),
                           ("copying last layers", 74.26), ("dropping last two layers", 73.32)):  # fmt: skip
        assert averages[name] == pytest.approx(reported, abs=0.3)
