"""Exports with a head: PEFT's folder brings it, a merged model has it, and one that lost it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.coverage.bases import make, tokens
from benchmarks.exports.faults import _edit, alpha_lost, nothing_merged, wrong_prefix
from torch import Tensor, nn

from spectune.deltas import Delta, attach, merge_and_measure, route
from spectune.errors import ConfigError, ExportError
from spectune.methods import BY_NAME
from spectune.objectives import objective_for, objective_of
from spectune.storage import expected_answers, prove_export, write_gguf_lora, write_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]
#: the task, labels, and the loss of outputs and labels as torch has it
HEADS: dict[str, tuple[str, int, Any]] = {
    "classes": ("SEQ_CLS", 3, nn.functional.cross_entropy),
    "number": ("SEQ_CLS", 1, lambda outputs, labels: nn.functional.mse_loss(outputs[:, 0], labels)),
    "tags": ("TOKEN_CLS", 4, nn.functional.cross_entropy),
}


def put_on(kind: str, method: str, base: Path) -> Delta:
    task, count, _ = HEADS[kind]
    make("gpt2").save_pretrained(base)
    config = make("gpt2").config
    config.num_labels = count
    load: Any = objective_for(task, config).auto_class.from_pretrained
    model = load(base, num_labels=count, pad_token_id=0).eval()
    delta = attach(model, BY_NAME[method](), "run")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return delta


def batches(kind: str) -> list[dict[str, Tensor]]:
    found = []
    for seed, length in enumerate((9, 5, 7)):
        ids = tokens(1, length, seed=seed)
        labels = {
            "classes": torch.tensor([seed]), "number": torch.tensor([seed / 2]),
            "tags": torch.where(torch.arange(length) % 3 == 0, torch.arange(length) % 4, -100)[None],
        }[kind]  # fmt: skip
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_peft_runs_the_folder_with_its_head(kind: str, method: str, tmp_path: Path) -> None:
    delta = put_on(kind, method, tmp_path / "base")
    rows = batches(kind)
    expected = expected_answers(delta, rows)
    with torch.no_grad(), route(delta.model, "run"):
        outputs = torch.cat([delta.model(input_ids=row["input_ids"]).logits.flatten(0, -2) for row in rows])
    labels = torch.cat([row["labels"].flatten() for row in rows])
    assert expected.tuned_loss == pytest.approx(float(HEADS[kind][2](outputs, labels)), rel=1e-5)
    write_peft(delta, tmp_path / "peft")
    proof = prove_export(tmp_path / "peft", expected)
    assert proof.mean_effect > 100 * proof.mean
    assert proof.loss_unit == {"classes": "nats per row", "number": "squared error",
                               "tags": "nats per word"}[kind]  # fmt: skip
    if method == "lora":
        alpha_lost(tmp_path / "peft", tmp_path)
        with pytest.raises(ExportError):
            prove_export(tmp_path / "peft", expected)


def test_a_head_that_is_lost_is_refused(tmp_path: Path) -> None:
    delta = put_on("classes", "lora", tmp_path / "base")
    expected = expected_answers(delta, batches("classes"))
    write_peft(delta, tmp_path / "peft")
    assert _edit(
        tmp_path / "peft", "adapter_model.safetensors",
        lambda ts: {name: tensor for name, tensor in ts.items() if "score" not in name},
    )  # fmt: skip
    with pytest.raises(ExportError):
        prove_export(tmp_path / "peft", expected)
    with pytest.raises(ConfigError, match="has no format 'gguf-lora'"):
        write_gguf_lora(delta, tmp_path / "gguf")


def test_a_merged_model_has_its_head(tmp_path: Path) -> None:
    delta = put_on("classes", "lora", tmp_path / "base")
    expected = expected_answers(delta, batches("classes"))
    merged, _ = merge_and_measure(delta.model, "run", check=False)
    assert objective_of(merged).task_type == "SEQ_CLS"
    merged.save_pretrained(tmp_path / "merged")
    prove_export(tmp_path / "merged", expected)
    nothing_merged(tmp_path / "merged", tmp_path / "base")
    with pytest.raises(ExportError):
        prove_export(tmp_path / "merged", expected)
    write_peft(delta, tmp_path / "peft")
    wrong_prefix(tmp_path / "peft", tmp_path)
    with pytest.raises(ExportError):
        prove_export(tmp_path / "peft", expected)
