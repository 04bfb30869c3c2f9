"""A delta's folder knows the base that it was trained on, and loads on no other one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectune.deltas import attach, attached, detach, merge
from spectune.deltas.attachment import BaseIdentity
from spectune.errors import DataError
from spectune.methods import BitFit, FullFineTuning, LoRA
from spectune.storage import load, load_delta
from spectune.training import TrainingConfig, train
from tests.contract.families import llama
from tests.support import make_model, make_rows, make_tokenizer

#: what a version with format 1 wrote of spectune-tiny: 32 numbers each of the embeddings and of the last norm
OLD = json.loads((Path(__file__).parent / "format_1_of_spectune_tiny.json").read_text())


@pytest.fixture
def base() -> Any:
    torch.manual_seed(0)
    return llama().eval()


def saved(model: Any, folder: Path, method: Any = None) -> Path:
    attach(model, method or LoRA(r=2), "task").save(folder)
    detach(model, "task")
    return folder


def drawn_anew(model: Any) -> None:
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


def one_row(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight[7] *= 1.1


def one_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight *= 1.01


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drawn_anew, r"21 of 21 linears differ.*\nequal: embeddings, norms, head"),
        (one_row, r"1 of 21 linears differ: model\.layers\.1\.mlp\.down_proj"),
        (one_norm, r"1 of 7 norms differ: model\.layers\.0\.input_layernorm"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_does_not_load_on_another_base(
    base: Any, change: Callable[[Any], None], named: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved(base, tmp_path / "task")
    load_delta(copy.deepcopy(base).to(dtype), tmp_path / "task")
    other = copy.deepcopy(base)
    with torch.no_grad():
        change(other)
    with pytest.raises(DataError, match=r"(?s)was trained on another base.*" + named):
        load_delta(other.to(dtype), tmp_path / "task")
    assert not attached(other)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_delta_of_a_merged_base_does_not_load_on_the_raw_one(base: Any, size: float, tmp_path: Path) -> None:
    """A base of instructions is one on which a delta was merged, however small its effect is."""
    delta = attach(base, LoRA(r=2), "sft")
    for name, weight in delta.named_parameters():
        nn.init.normal_(weight, std=size if name.endswith("lora_B") else 1.0)
    instructed = merge(base, "sft", check=False)
    detach(base, "sft")
    saved(instructed, tmp_path / "task")
    with pytest.raises(DataError, match="21 of 21 linears differ"):
        load_delta(base, tmp_path / "task")


def test_other_random_rows_of_added_tokens_are_named(base: Any, tmp_path: Path) -> None:
    sessions = [copy.deepcopy(base) for _ in range(2)]
    for session in sessions:
        session.resize_token_embeddings(100)
    saved(sessions[0], tmp_path / "task")
    named = r"rows 97 to 99 of the 100 of model\.embed_tokens differ, the others are equal \(rows that are added"
    with pytest.raises(DataError, match=named):
        load_delta(sessions[1], tmp_path / "task")
    with pytest.raises(DataError, match=r"model\.embed_tokens has 97 rows, 100 were there: 3 tokens are missing"):
        load_delta(base, tmp_path / "task")


def test_tokens_that_were_added_after_training_change_nothing_and_are_told(
    base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(base, tmp_path / "task")
    ids = torch.arange(9)[None]
    load_delta(base, tmp_path / "task")
    before = base(input_ids=ids).logits
    detach(base, "task")
    base.resize_token_embeddings(100)
    load_delta(base, tmp_path / "task")
    assert "model.embed_tokens has 3 rows more than the 97 that were there, which are equal" in caplog.text
    assert torch.allclose(base(input_ids=ids).logits[..., :97], before, atol=1e-6)


def test_attach_reads_no_weight_and_save_reads_them(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[str]()
    whole = BaseIdentity.now

    def now(identity: BaseIdentity, name: str) -> dict[str, Any]:
        taken.append(name)
        return whole(identity, name)

    monkeypatch.setattr(BaseIdentity, "now", now)
    monkeypatch.setattr(BaseIdentity, "fingerprint", property(lambda _: pytest.fail("asked at attach")))
    delta = attach(base, LoRA(r=2), "task")
    assert not taken
    delta.save(tmp_path / "task")
    assert taken == ["task"]


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def around_torch(weight: nn.Parameter) -> None:
    weight.data += 0.1  # does not count as a write


@pytest.mark.parametrize("write", [in_place, around_torch])
@pytest.mark.parametrize("asked", [False, True])
def test_a_base_that_was_changed_since_attach_is_told_and_stored_as_it_is(
    base: Any, write: Callable[[nn.Parameter], None], asked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untouched, delta = copy.deepcopy(base), attach(base, LoRA(r=2), "task")
    if asked:  # as training does, at its start
        assert delta.base_fingerprint["parts"]
    delta.save(tmp_path / "before")
    assert not caplog.records
    write(base.model.layers[1].mlp.up_proj.weight)
    delta.save(tmp_path / "task")
    [record] = caplog.records
    assert "delta 'task': the base has changed since the delta was attached" in record.getMessage()
    assert "model.layers.1.mlp.up_proj" in record.getMessage()
    delta.save(tmp_path / "again")
    assert len(caplog.records) == 1
    detach(base, "task")
    load_delta(base, tmp_path / "task")
    with pytest.raises(DataError, match=r"1 of 21 linears differ: model\.layers\.1\.mlp\.up_proj"):
        load_delta(untouched, tmp_path / "task")


def test_training_a_delta_leaves_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, settings = make_model(), TrainingConfig(max_steps=2, eval_steps=1, save_steps=1, output_dir=tmp_path / "run")
    with caplog.at_level(logging.WARNING, "spectune"):
        train(model, make_tokenizer(), BitFit(), make_rows(), make_rows(4), settings)
    assert "the base has changed" not in caplog.text
    load_delta(make_model(), tmp_path / "run" / "best")


def test_a_fully_tuned_model_belongs_to_the_base_that_training_began_with(tmp_path: Path) -> None:
    model, settings = make_model(), TrainingConfig(max_steps=2, learning_rate=0.1, output_dir=tmp_path / "run")
    train(model, make_tokenizer(), FullFineTuning(), make_rows(), make_rows(4), settings)
    loaded = make_model()
    load_delta(loaded, tmp_path / "run" / "best", name="tuned")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(DataError, match="linears differ"):
        load_delta(merge(loaded, "tuned"), tmp_path / "run" / "best")


def test_folders_of_format_1_load_with_the_check_that_they_allow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load("spectune-tiny")
    file = saved(model, tmp_path / "task") / "spectune.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format": 1, "base": OLD}))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight += 1  # which format 1 does not see
    load_delta(model, tmp_path / "task")
    assert "was written by an earlier version of spectune" in caplog.text
    detach(model, "task")
    with torch.no_grad():
        model.transformer.wte.weight.neg_()
    with pytest.raises(DataError, match=r"the weights of transformer\.wte are another base's"):
        load_delta(model, tmp_path / "task")
    with pytest.raises(DataError, match="the base's parts differ"):
        load_delta(make_model(), tmp_path / "task")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda part: part["digests"].pop(), "are not those of a weight of this shape"),
        (lambda part: part["tail"].pop(), "are not those of a weight of this shape"),
        (lambda part: part.update(sums="AAAA"), "sums"),
        (lambda part: part.update(shape=[10**30, 4]), "shape"),
        (lambda part: part.update(shape=[]), "are not those of a weight of this shape"),
        (lambda part: part.update(same_as="nothing"), "the same as nothing, which is no such weight"),
        (lambda part: part.update(digests=["no"]), "digests"),
    ],
)
def test_a_damaged_fingerprint_is_refused(base: Any, change: Any, said: str, tmp_path: Path) -> None:
    file = saved(base, tmp_path / "task") / "spectune.json"
    content = json.loads(file.read_text())
    change(content["base"]["parts"]["model.embed_tokens.weight"])
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        load_delta(base, tmp_path / "task")
    assert not attached(base)
