"""Heads trained on a frozen encoder, on the fly and from a cache: A2, A3 and A8 of the specification."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mslt.errors import MsltError
from mslt.evaluate import pool_cache
from mslt.evaluate.fine_tune import FineTuning
from mslt.evaluate.glue import Source
from mslt.evaluate.glue_data import Row, read_split
from mslt.evaluate.glue_tasks import TASKS
from mslt.evaluate.pool import (
    Backbone,
    OpenedHead,
    Pooled,
    answers_on,
    from_cache,
    head_settings,
    importance,
    logits_of,
    on_the_fly,
    open_backbone,
    rows_of_epochs,
    score_heads,
    speedup_of_layers,
    states_of,
    train_heads,
)
from mslt.evaluate.pool_cache import StatesCache, cache_bytes, make_cache, refuse_too_large
from mslt.evaluate.pool_data import PoolTask, SquadFiles, glue_task, rows_digest, split_off, squad_task
from mslt.evaluate.squad import Shape
from mslt.files import lock_alone
from mslt.heads.pooling import PoolingHead, new_head
from mslt.models import families
from tests.encoders import write_encoder
from tests.glue_files import write_glue
from tests.squad_files import questions

SETTINGS = FineTuning(learning_rate=1e-2, batch_size=16, num_epochs=1, seed=3)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), num_train=96)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), num_hidden_layers=3)


@pytest.fixture
def backbone(encoder: Path) -> Backbone:
    return open_backbone(str(encoder), None, "cpu")


def task_of(name: str, backbone: Backbone, glue: Path) -> PoolTask:
    if name == "SQuAD":
        made = questions(48)
        return squad_task(SquadFiles(made, made[:16]), backbone.tokenizer, Shape(32, 4, 10))
    return glue_task(Source(backbone.source, None, glue, True), name, backbone.tokenizer, 24)


def head(backbone: Backbone, task: PoolTask, seed: int = 0, **changes: Any) -> PoolingHead:
    given = {"kind": "adapter", "adapter_width": 4, "tokens": "flatten", "pad_states": "zero", "skip": False}
    states = changes.pop("states", (0, 3))
    return new_head(head_settings(task, 32, states, **{**given, **changes}), backbone.model, seed)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["SST-2", "RTE", "STS-B", "SQuAD"])
def test_training_leaves_the_encoder_as_it_was_to_the_bit(name: str, backbone: Backbone, glue: Path) -> None:
    """A2."""
    task = task_of(name, backbone, glue)
    made, before = head(backbone, task), state(backbone.model)
    first = state(made)
    seen: list[int] = []
    hook = torch.autograd.graph.register_multi_grad_hook(tuple(made.parameters()), lambda grads: seen.append(1))
    collate = backbone.collate(task, False)
    whole = Pooled(backbone.model, [made])
    for _ in train_heads(whole, range(len(task.train)), on_the_fly(task.train, collate), SETTINGS, [1e-2]):
        assert not backbone.model.training
    hook.remove()
    assert len(seen) == -(-len(task.train) // 16)
    assert same(before, state(backbone.model))
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert not any(torch.equal(first[key], tensor) for key, tensor in made.state_dict().items())
    (scores,) = score_heads(whole, task, collate, "fp32")
    assert scores is not None
    assert 0 <= task.headline(scores) <= 1 or name == "STS-B"


def test_heads_that_share_a_pass_train_as_each_alone(backbone: Backbone, glue: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    changes: list[dict[str, Any]] = [
        {}, {"adapter_width": 8}, {"kind": "mix"}, {"kind": "last"}, {"states": (1, 2)}, {"tokens": "attention"},
        {"kind": "last", "tokens": "first", "adapter_width": 0}, {"kind": "unshared"}, {"kind": "mean"},
    ]  # fmt: skip
    rates = [1e-2 / (1 + index) for index in range(len(changes))]

    def trained(chosen: list[int]) -> list[PoolingHead]:
        heads = [head(backbone, task, index, **dict(changes[index])) for index in chosen]
        batch_of = on_the_fly(task.train, backbone.collate(task, False))
        whole = Pooled(backbone.model, heads)
        assert list(train_heads(whole, range(96), batch_of, SETTINGS, [rates[index] for index in chosen])) == [1]
        return heads

    for index, together in enumerate(trained(list(range(len(changes))))):
        (alone,) = trained([index])
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name], tensor, rtol=0, atol=2e-4, msg=f"{index} {name}")


def test_looks_into_an_epoch_change_nothing(backbone: Backbone, glue: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    found = []
    for looks in (1, 3):
        whole = Pooled(backbone.model, [head(backbone, task)])
        batch_of = on_the_fly(task.train, backbone.collate(task, False))
        done = []
        for each in train_heads(whole, range(96), batch_of, SETTINGS, [1e-2], looks):
            done.append(each)
            logits_of(whole, range(4), task.train, batch_of, "fp32")
        found.append((done, state(whole.heads)))
    assert found[0][0] == [1]
    assert found[1][0] == pytest.approx([1 / 3, 2 / 3, 1])
    assert same(found[0][1], found[1][1])


def test_layers_above_the_last_state_never_run(backbone: Backbone, glue: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    ran: list[int] = []
    for index, layer in enumerate(families.layers(backbone.model)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    collate = backbone.collate(task, False)
    whole = Pooled(backbone.model, [head(backbone, task, states=(1, 2))])
    logits_of(whole, range(8), task.train, on_the_fly(task.train, collate), "fp32")
    assert ran == [0, 1]
    ran.clear()
    assert speedup_of_layers(backbone.model, collate, 1, num_turns=1) > 0
    assert ran == [0, 0, 1, 2] * 2, "a warm-up and a turn: one layer, then all three"


@pytest.mark.parametrize("name", ["SST-2", "SQuAD"])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_cache_holds_gives_the_same_logits(
    name: str, keeps: bool, dtype: str, backbone: Backbone, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3; of bf16 the metric is compared where an encoder has learned something."""
    monkeypatch.setattr(pool_cache, "FILE_BYTES", 50_000)
    task = task_of(name, backbone, glue)
    collate = backbone.collate(task, keeps)
    cache = made_cache(tmp_path, backbone, task, keeps, dtype)
    assert len(cache.files) > 2
    num_tokens = sum(task.num_tokens if keeps else len(each.ids) for each in task.train)
    assert sum(file.nbytes for file in cache.files) == cache_bytes(num_tokens, 4, 32, dtype)
    whole = Pooled(backbone.model, [head(backbone, task, pad_states="keep" if keeps else "zero", states=(1, 3))])
    rows = range(len(task.train))
    (computed,) = logits_of(whole, rows, task.train, on_the_fly(task.train, collate), "fp32")
    (read,) = logits_of(whole, rows, task.train, from_cache(cache, task.train, collate, whole.states), "fp32")
    for one, other in zip(computed, read, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if dtype == "fp32" else 0.03)


def made_cache(
    folder: Path, backbone: Backbone, task: PoolTask, keeps: bool = False, dtype: str = "bf16",
    states: range = range(4), max_gb: float = 1.0, progress: pool_cache.Progress = lambda done, total: None,
) -> StatesCache:  # fmt: skip
    return make_cache(folder, backbone.model, backbone.described["backbone_sha256"], task.train,
                      backbone.collate(task, keeps), states, dtype, max_gb, progress)  # fmt: skip


def test_training_from_a_cache_is_training_on_the_fly(backbone: Backbone, glue: Path, tmp_path: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    collate = backbone.collate(task, False)
    cache = made_cache(tmp_path, backbone, task, dtype="fp32")
    found = []
    for batch_of in (on_the_fly(task.train, collate), from_cache(cache, task.train, collate, range(4))):
        whole = Pooled(backbone.model, [head(backbone, task)])
        list(train_heads(whole, range(96), batch_of, SETTINGS, [1e-2]))
        found.append(state(whole.heads))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-4)


def test_a_killed_cache_goes_on_and_serves_fewer_layers(
    backbone: Backbone, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_cache, "FILE_BYTES", 60_000)
    task = task_of("SST-2", backbone, glue)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_cache(tmp_path, backbone, task, progress=stop)
    described = json.loads((tmp_path / "cache.json").read_text())
    assert len(described["files"]) == 2
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    fewer = made_cache(tmp_path, backbone, task, states=range(1, 3))  # goes on with all that it began with
    assert {file: file.stat().st_mtime_ns for file in written} == written
    cache = made_cache(tmp_path, backbone, task)
    assert len(cache.files) > 2
    whole = made_cache(tmp_path / "whole", backbone, task)
    everything = whole.read(range(96), range(4))
    assert torch.equal(cache.read(range(96), range(4)), everything)
    assert torch.equal(fewer.read(range(96), range(1, 3)), everything[:, 1:3])
    num_bytes = cache_bytes(sum(len(each.ids) for each in task.train), 4, 32, "bf16")
    with pytest.raises(MsltError, match=f"{num_bytes:,} bytes"):
        made_cache(tmp_path, backbone, task, states=range(1, 3), max_gb=(num_bytes - 1) / 1e9)
    monkeypatch.setattr(pool_cache, "FILE_BYTES", 50_000)
    with pytest.raises(MsltError, match=r"states-00000.*holds rows \[0, "):
        made_cache(tmp_path, backbone, task)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_refused(damage: str, backbone: Backbone, glue: Path, tmp_path: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    made_cache(tmp_path, backbone, task)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if damage == "cut" else whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:])
    with pytest.raises(MsltError, match=r"states-00000.safetensors: is not what was written .*the same command makes"):
        made_cache(tmp_path, backbone, task)


def test_another_cache_is_refused(backbone: Backbone, glue: Path, tmp_path: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    made_cache(tmp_path, backbone, task, states=range(1, 3))
    for other, changes, said in (
        (task_of("RTE", backbone, glue), {}, "rows_sha256"),
        (task, {"dtype": "fp32"}, "dtype bf16, now fp32"),
        (task, {"keeps": True}, "padding None, now 24"),
        (task, {"states": range(4)}, "states"),
    ):
        with pytest.raises(MsltError, match=f"{said}.*give another --cache"):
            made_cache(tmp_path, backbone, other, **{"states": range(1, 3), **changes})
    whole = (tmp_path / "cache.json").read_text()
    for damaged in ("{", re.sub(r'"states": \[[^]]*\]', '"states": ["a", "b"]', whole)):
        (tmp_path / "cache.json").write_text(damaged)
        with pytest.raises(MsltError, match="cannot be read; remove"):
            made_cache(tmp_path, backbone, task)
    (tmp_path / "cache.json").write_text(re.sub(r'"bytes": \d+', '"bytes": "many"', whole))
    with pytest.raises(MsltError, match="is not what was written"):
        made_cache(tmp_path, backbone, task, states=range(1, 3))
    (tmp_path / "cache.json").write_text(whole)
    with lock_alone(tmp_path / ".lock", None), pytest.raises(MsltError, match="another process writes this cache"):
        made_cache(tmp_path, backbone, task, states=range(1, 3))


def test_a_cache_over_the_limit_is_refused_with_its_size(backbone: Backbone, glue: Path, tmp_path: Path) -> None:
    """A8: the paper's cache of RTE, every row padded to 250 tokens, in fp32."""
    num_bytes = cache_bytes(2490 * 250, 13, 768, "fp32")
    assert num_bytes == 24_860_160_000
    with pytest.raises(MsltError, match=r"--max-cache-gb 20: the hidden states of RTE take 24\.86 GB"):
        refuse_too_large(num_bytes, 20, "RTE")
    refuse_too_large(num_bytes, 24.87, "RTE")
    task = task_of("SST-2", backbone, glue)
    exact = cache_bytes(sum(len(each.ids) for each in task.train), 4, 32, "bf16")
    with pytest.raises(MsltError, match=f"{exact:,} bytes"):
        made_cache(tmp_path / "none", backbone, task, max_gb=(exact - 1) / 1e9)
    assert not (tmp_path / "none").exists()
    assert sum(file.nbytes for file in made_cache(tmp_path, backbone, task, max_gb=exact / 1e9).files) == exact


def test_rows_are_cut_as_glue_cuts_them_and_digests_tell_them_apart(backbone: Backbone, glue: Path) -> None:
    task = task_of("RTE", backbone, glue)
    (row, *_) = read_split(TASKS["RTE"], "train", glue, True)
    made = backbone.tokenizer(row.text, row.pair, truncation=True, max_length=24)
    assert task.train[0].ids.tolist() == made["input_ids"]
    assert task.train[0].types.tolist() == made["token_type_ids"]
    assert set(task.train[0].types.tolist()) == {0, 1}
    assert rows_digest(task.train) != rows_digest(task.train[::-1])
    assert isinstance(row, Row)
    made, other = questions(8), questions(8)
    other[0] = replace(other[0], answers=())
    tasks = [squad_task(SquadFiles(made, dev), backbone.tokenizer, Shape(32, 4, 10)) for dev in (made, other)]
    assert tasks[0].digest("dev") != tasks[1].digest("dev")
    assert tasks[0].digest("train") == tasks[1].digest("train")


def test_importance_is_what_the_score_loses_without_a_state(backbone: Backbone, glue: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    made = head(backbone, task, kind="mix")
    with torch.no_grad():
        made.weights_L.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    found = importance(backbone, made, task)
    assert found["states"] == [0, 1, 2, 3]
    assert sum(found["weights"]) == pytest.approx(1)
    assert int(np.argmax(found["weights"])) == 1
    assert found["drop"] == [pytest.approx(found["headline"] - each) for each in found["without"]]
    with pytest.raises(MsltError, match="pooler last: reads one hidden state"):
        importance(backbone, head(backbone, task, kind="last"), task)


def test_heads_of_several_tasks_answer_in_one_pass(backbone: Backbone, glue: Path) -> None:
    ran: list[int] = []
    for index, layer in enumerate(families.layers(backbone.model)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    opened = []
    for name in ("STS-B", "RTE"):
        task = task_of(name, backbone, glue)
        described = {"task": name, "labels": list(task.labels), "max_tokens": task.num_tokens}
        opened.append(OpenedHead(Path(name), head(backbone, task, states=(0, 2)), described))
    found = answers_on(backbone, opened, "the film was good .", "the book was bad .")
    assert ran == [0, 1]
    assert [each["task"] for each in found] == ["STS-B", "RTE"]
    assert found[1]["answer"] in ("entailment", "not_entailment")
    assert found[0]["shares"] == {}
    assert float(found[0]["answer"]) == pytest.approx(0, abs=5)
    spans = OpenedHead(Path("spans"), head(backbone, task_of("SQuAD", backbone, glue)), {"max_tokens": 32})
    with pytest.raises(MsltError, match="spans: finds answers of questions"):
        answers_on(backbone, [spans], "a")


def test_a_text_that_a_head_cannot_read_is_refused(backbone: Backbone, glue: Path) -> None:
    """Heads of 24 and of 16 tokens agree on a row that both read whole, and of a longer one nothing is cut."""
    task = task_of("SST-2", backbone, glue)

    def opened(num_tokens: int, **changes: Any) -> OpenedHead:
        described = {"task": "SST-2", "labels": ["0", "1"], "max_tokens": num_tokens}
        return OpenedHead(Path(f"of-{num_tokens}"), head(backbone, replace(task, num_tokens=num_tokens), **changes),
                          described)  # fmt: skip

    both = [opened(24), opened(16)]
    text, long = "the film was good .", "the film was good . " * 4
    for alone, together in zip(both, answers_on(backbone, both, text), strict=True):
        assert answers_on(backbone, [alone], text)[0]["shares"] == pytest.approx(together["shares"])
    with pytest.raises(MsltError, match="--text: is 22 tokens, and of-16 takes 16"):
        answers_on(backbone, both, long)
    assert answers_on(backbone, both[1:], long)[0]["answer"] in ("0", "1"), "cut, as its rows were"
    kept = [opened(24, pad_states="keep"), opened(16, pad_states="keep")]
    assert answers_on(backbone, kept[1:], text)
    with pytest.raises(MsltError, match="of rows of 16 and of 24 tokens"):
        answers_on(backbone, kept, text)
    with pytest.raises(MsltError, match="SST-2 has one sentence"):
        answers_on(backbone, both, text, text)
    pairs = OpenedHead(Path("rte"), head(backbone, task_of("RTE", backbone, glue)), {"task": "RTE", "max_tokens": 24})
    with pytest.raises(MsltError, match="RTE has two sentences"):
        answers_on(backbone, [pairs], text)


def test_a_head_for_spans_learns(backbone: Backbone, glue: Path) -> None:
    """A7, of a small encoder with random weights."""
    task = task_of("SQuAD", backbone, glue)
    collate = backbone.collate(task, False)
    whole = Pooled(backbone.model, [head(backbone, task, adapter_width=16)])

    def loss() -> float:
        with torch.no_grad():
            return float(whole(**collate(task.train)).loss)

    before = loss()
    settings = FineTuning(learning_rate=1e-2, batch_size=16, num_epochs=8, seed=3)
    list(train_heads(whole, range(len(task.train)), on_the_fly(task.train, collate), settings, [1e-2]))
    assert loss() <= 0.8 * before


def test_heads_of_which_one_reads_padding_do_not_share_a_pass(backbone: Backbone, glue: Path) -> None:
    task = task_of("SST-2", backbone, glue)
    with pytest.raises(MsltError, match="pad_states"):
        Pooled(backbone.model, [head(backbone, task), head(backbone, task, pad_states="keep")])


def test_layers_shares_and_epochs() -> None:
    assert states_of("all", 12) == (0, 12)
    assert states_of("1:4", 12) == (1, 4)
    for wrong in ("1", "4:1", "0:13", "a:b", "1:-1", ":3"):
        with pytest.raises(MsltError, match=f"--layers {wrong}: give all, or two hidden states like 1:12"):
            states_of(wrong, 12)
    rest, chosen = split_off(range(50), 0.1, 0)
    assert (len(rest), len(chosen), sorted(rest + chosen)) == (45, 5, list(range(50)))
    rest, chosen = split_off([0, 0, 1, 1, 2, 2], 0.3, 0)
    assert (len(rest), len(chosen), chosen[1] - chosen[0]) == (4, 2, 1)
    with pytest.raises(MsltError, match="of 2 rows, or contexts, none is left"):
        split_off([0, 0, 1], 0.9, 0)
    assert rows_of_epochs(50, 3, 0) == (list(range(50)), 3)
    less, more = rows_of_epochs(50, 0.1, 0)[0], rows_of_epochs(50, 0.3, 0)[0]
    assert (len(less), len(more)) == (5, 15)
    assert set(less) <= set(more)
    for wrong in (0, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(MsltError, match="--backbone-epochs"):
            rows_of_epochs(50, wrong, 0)
