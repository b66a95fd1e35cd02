"""Exported graphs beside the model: D12 of the specification, for every family, in shapes that they were not made
with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mslt.evaluate.exit_export import Batch, Run, export, run_chain, runner
from mslt.heads.early_exit import EarlyExitModel
from mslt.heads.exit_rule import by_entropy, by_patience
from tests.exits import KINDS, batch, middle_threshold, with_exits

SHAPES = ((1, 3), (1, 32), (2, 17), (7, 20), (40, 9))  # rows, tokens


def inputs_of(kind: str, num_rows: int, most: int, seed: int) -> Batch:
    """As a tokenizer orders them: types, where the family has them, before the mask."""
    found = batch(num_rows, most, seed)
    types = (torch.arange(most) >= 2).long().expand(num_rows, most).contiguous()
    has_types = {} if kind == "Roberta" else {"token_type_ids": types}
    return {"input_ids": found["input_ids"], **has_types, "attention_mask": found["attention_mask"]}


def assert_same(exits: EarlyExitModel, run: Run, names: list[str], inputs: Batch) -> None:
    num_exits = exits.num_exits
    arrays = [inputs[name].numpy() for name in names]  # as anybody who reads exits.json would
    mask = inputs["attention_mask"].numpy()
    with torch.no_grad():
        expected = exits.all_logits(**inputs).numpy()
    for k in range(num_exits):
        hidden, logits = run(k, arrays)
        np.testing.assert_allclose(logits, expected[k], rtol=0, atol=1e-5 * max(1, np.abs(expected[k]).max()))
        arrays = [hidden, mask]
    for rule in (by_entropy(middle_threshold(exits, inputs)), by_patience(1)):
        logits, at = run_chain(run, num_exits, rule, inputs)
        ours = exits(**inputs, rule=rule)
        assert at.tolist() == ours.exit_layer.tolist()
        np.testing.assert_allclose(logits, ours.logits.numpy(), rtol=0, atol=1e-4)
        assert len(mask) < 40 or len(set(at.tolist())) >= 2, "rows leave at unlike layers"


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_answer_as_the_model_in_any_shape(kind: str, format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    exits = with_exits(kind, pooling="mean" if kind == "Electra" else "cls")
    export(exits, by_entropy(0.5), inputs_of(kind, 3, 9, seed=5), tmp_path / "graphs", format, ["0", "1"])
    run = runner(tmp_path / "graphs", format)
    names = json.loads((tmp_path / "graphs" / "exits.json").read_text())["inputs"]
    for seed, (num_rows, most) in enumerate(SHAPES):
        assert_same(exits, run, names, inputs_of(kind, num_rows, most, seed))
