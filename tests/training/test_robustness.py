"""What training refuses, keeps and leaves behind: identities, divergence, routes, and the files beside the delta."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from spectune.deltas import attach, attached, detach, route
from spectune.errors import ConfigError, DivergedError
from spectune.files.strict_json import strict_json
from spectune.methods import BitFit, FullFineTuning, LoRA, PrefixTuning
from spectune.storage import load, load_delta
from spectune.training import RunResult, TrainingConfig, train
from spectune.training import loop as loop_module
from tests.support import checkpointed_by_transformers, make_model, make_rows, make_tokenizer

QUIET = Console(quiet=True)


def settings(**changes: Any) -> TrainingConfig:
    given = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, **changes}
    return TrainingConfig(**given)


def run(method_or_delta: Any, config: TrainingConfig, model: Any = None, **given: Any) -> RunResult:
    tokenizer = given.pop("tokenizer", None) or make_tokenizer()
    rows = given.pop("rows", None) or make_rows()
    base = model if model is not None else make_model()
    return train(base, tokenizer, method_or_delta, rows, make_rows(6), config, console=QUIET, **given)


def weights(delta: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in delta.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (LoRA(r=2), {}),
        (FullFineTuning(), {}),
        (PrefixTuning(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8), {}),
        (LoRA(r=2), {"load_best_at_end": False, "learning_rate": 0.5, "max_steps": 12, "eval_steps": 1}),
    ],
)
def test_resuming_a_finished_run_gives_the_delta_its_trained_weights(
    method: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = settings(output_dir=tmp_path / "run", **changes)
    first = make_model()
    result = run(method, config, first)
    again = make_model()
    assert run(method, config.model_copy(update={"resume": True}), again) == result
    trained, loaded = weights(attached(first)["default"]), weights(attached(again)["default"])
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        (BitFit(), {}, "method: 'lora' in the finished run, 'bitfit' now"),
        (LoRA(r=4), {}, r"method\.r: 2 in the finished run, 4 now"),
        (LoRA(r=2), {"max_steps": 9}, "max_steps: 2 in the finished run, 9 now"),
        (LoRA(r=2), {"rows": make_rows(12)}, "data: other rows"),
        (LoRA(r=2), {"dtype": torch.bfloat16}, "dtype: 'float32' in the finished run, 'bfloat16' now"),
        (LoRA(r=2), {"other_base": True}, "base: all 300 rows of transformer.wte differ"),
    ],
)
def test_a_finished_run_with_another_identity_is_refused(
    method: Any, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    run(LoRA(r=2), settings(output_dir=tmp_path / "run"))
    model = make_model(dtype=changes.pop("dtype", torch.float32))
    if changes.pop("other_base", False):
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_()
    rows = changes.pop("rows", None)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=expected):
        run(method, settings(output_dir=tmp_path / "run", resume=True, **changes), model, rows=rows)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(output_dir=tmp_path / "run", save_steps=1, max_steps=4, eval_steps=2)
    monkeypatch.setattr(loop_module.Loop, "validate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(LoRA(r=2), config)
    monkeypatch.undo()
    other = make_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    with pytest.raises(ConfigError, match="base: "):
        run(LoRA(r=2), config.model_copy(update={"resume": True}), other)


def test_a_delta_that_is_not_active_is_the_one_trained() -> None:
    model = make_model()
    first, second = attach(model, LoRA(r=2), "first"), attach(model, LoRA(r=2), "second")
    before = weights(first), weights(second)
    result = run(first, settings(max_steps=6), model)
    assert any(not torch.equal(t, before[0][name]) for name, t in weights(first).items())
    assert all(torch.equal(t, before[1][name]) for name, t in weights(second).items())
    assert result.valid_loss is not None
    assert result.base_valid_loss is not None
    assert result.valid_loss < result.base_valid_loss
    alone = make_model()
    assert run(LoRA(r=2), settings(max_steps=6), alone).valid_loss == pytest.approx(result.valid_loss, abs=1e-5)


def test_deltas_that_cannot_be_trained_say_why(tmp_path: Path) -> None:
    model = make_model()
    delta = attach(model, LoRA(r=2), "mine")
    with pytest.raises(ConfigError, match="attached to another model"):
        run(delta, settings())
    delta.save(tmp_path / "mine")
    detach(model, "mine")
    with pytest.raises(ConfigError, match="not attached to the model any more"):
        run(delta, settings(), model)
    with pytest.raises(ConfigError, match="trainable=True"):
        run(load_delta(model, tmp_path / "mine"), settings(), model)


@pytest.mark.parametrize("method", [LoRA(r=2), FullFineTuning()])
def test_divergence_before_any_validation_keeps_the_start(method: Any, tmp_path: Path) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = settings(output_dir=tmp_path / "run", learning_rate=1e30, max_steps=4, eval_steps=2)
    with pytest.raises(DivergedError, match=r"weights of the start \(step 0\) are kept in .*best"):
        run(method, config, model)
    if method.trains_base:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    other = make_model()
    load_delta(other, tmp_path / "run" / "best", "kept")
    ids = torch.tensor([[5, 6, 7]])
    with route(model, "default"):
        expected = model(ids).logits
    assert torch.equal(other(ids).logits, expected)


def test_a_validation_loss_that_is_not_finite_is_a_divergence(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="the validation loss is nan after step 1"):
        run(LoRA(r=2), settings(output_dir=tmp_path / "run", learning_rate=1e30, max_steps=1))
    assert not (tmp_path / "run" / "result.json").exists()


def test_training_loss_after_early_stopping_inside_an_epoch() -> None:
    config = settings(learning_rate=0.5, max_steps=-1, eval_steps=1, early_stopping_patience=1, warmup_steps=0)
    result = run(LoRA(r=2), config)
    assert result.stopped_early
    assert result.steps < 6  # inside the first epoch
    assert result.train_loss is not None
    assert result.train_loss > 0


def test_best_says_how_rows_became_tokens(tmp_path: Path) -> None:
    config = settings(output_dir=tmp_path / "run", separator=" ", max_length=40)
    result = run(LoRA(r=2), config)
    written = json.loads((tmp_path / "run" / "best" / "training.json").read_text())
    expected = {"separator": " ", "max_length": 40, "row_shape": "prompt", "prompt_ends_with": "\n"}
    assert expected.items() <= written.items()
    assert expected.items() <= yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()).items()
    best = {path.name: path.stat().st_size for path in (tmp_path / "run" / "best").iterdir()}
    own = {name: size for name, size in best.items() if name not in ("training.json", "spectune.json")}
    assert result.stored_bytes == sum(own.values())


def test_row_shapes(tmp_path: Path) -> None:
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 6
    for name, rows in {"messages": chat, "text": [{"text": "Ada lives."}] * 6}.items():
        run(LoRA(r=2), settings(output_dir=tmp_path / name), rows=rows, tokenizer=make_tokenizer(chat=True))
        found = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert (found["row_shape"], found["prompt_ends_with"]) == (name, "")


def test_a_fully_tuned_folder_is_a_base_with_its_tokenizer(tmp_path: Path) -> None:
    run(FullFineTuning(), settings(output_dir=tmp_path / "run"))
    _, tokenizer = load(tmp_path / "run" / "best")
    text = "Ada lives in Leeds."
    assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]


def test_gradient_checkpointing_ends_with_the_run(recwarn: pytest.WarningsRecorder) -> None:
    for before in (False, True):
        model = make_model()
        if before:
            checkpointed_by_transformers(model)
        run(LoRA(r=2), settings(gradient_checkpointing=True), model)
        flags = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        assert flags
        assert set(flags) == {before}
    assert not [w for w in recwarn if "gradient_checkpointing" in str(w.message)]


def test_tensorboard_has_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(LoRA(r=2), settings(output_dir=tmp_path / "run", report_to="tensorboard"))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"loss", "learning_rate", "valid_loss", "train_loss"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == [1, 2]


def test_a_killed_run_that_goes_on_has_each_step_once_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For TensorBoard's own reader, and for a plain one, which takes every event of every file: what was logged past
    the checkpoint is taken out of the files when the run goes on, as it is of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    config = settings(output_dir=tmp_path / "run", report_to="tensorboard", max_steps=6, save_steps=2, logging_steps=1)
    folder = tmp_path / "run" / "tensorboard"
    finish = loop_module.Loop.finish

    def steps(tag: str = "loss") -> list[int]:
        board = EventAccumulator(str(folder))
        board.Reload()
        return [event.step for event in board.Scalars(tag)]

    def killed(self: Any) -> float:
        loss = finish(self)
        if self.run.progress.step == 5:
            # on disk already: a kill takes what a writer still holds
            assert steps()[:4] == [1, 2, 3, 4]
            raise MemoryError("killed")
        return loss

    monkeypatch.setattr(loop_module.Loop, "finish", killed)
    with pytest.raises(MemoryError):
        run(LoRA(r=2), config)
    monkeypatch.undo()
    [file] = folder.glob("*tfevents*")
    file.write_bytes(file.read_bytes() + b"\x09\0\0")  # an event that was not written to its end
    run(LoRA(r=2), config.model_copy(update={"resume": True}))
    assert steps() == [1, 2, 3, 4, 5, 6]
    plain = [event for path in sorted(folder.glob("*tfevents*")) for event in EventFileLoader(str(path)).Load()]
    assert [e.step for e in plain for value in e.summary.value if value.tag == "loss"] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_numbers_that_json_has_no_word_for_are_null() -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf")}}
    assert json.loads(strict_json(value)) == {"a": None, "b": [1.5, None], "c": {"d": None}}


def test_what_is_cut_and_which_rule_gave_the_rate_is_said_before_training(tmp_path: Path) -> None:
    out = io.StringIO()
    config = TrainingConfig(max_steps=1, max_length=8, per_device_train_batch_size=4)
    train(make_model(), make_tokenizer(), LoRA(r=1), make_rows(), make_rows(4), config, console=Console(file=out))
    assert "train: 24 of 24 rows cut to max_length" in out.getvalue()
    assert "(see data_report.json)" in out.getvalue()
    found = LoRA.learning_rates.at(make_model().config.hidden_size)
    assert f"learning rate {found.rate:g} (by rule for hidden size 32, from {found.source}; strong" in out.getvalue()
