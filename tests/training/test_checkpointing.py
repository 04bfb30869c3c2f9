"""What a run recomputes: nothing where memory suffices, else the cheapest that fits, and its numbers stay the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.blocks.compile import memory_budget
from spectune.errors import ConfigError, DoesNotFitError
from spectune.families import describe
from spectune.methods import LoRA, method_from_name
from spectune.planning.estimate import Estimate
from spectune.training import RunResult, TrainingConfig, prediction, train
from tests.support import checkpointed_by_transformers, make_model, make_rows, make_tokenizer
from tests.support.quick import others_slow


def run(method: Any = "lora", model: Any = None, **settings: Any) -> tuple[RunResult, str]:
    chosen = method_from_name(method) if isinstance(method, str) else method
    config = TrainingConfig(**{"max_steps": 3, "per_device_train_batch_size": 8, **settings})
    rows = make_rows(32)
    out = io.StringIO()
    model = model or make_model()
    result = train(model, make_tokenizer(), chosen, rows[:24], rows[24:], config, console=Console(file=out, width=400))
    return result, out.getvalue()


def needs(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """What each mode is predicted to take of the run above, weights included."""
    found: dict[Any, int] = {}
    estimate_of = prediction.estimate_of

    def noting(*args: Any, **kwargs: Any) -> Estimate:
        estimate = estimate_of(*args, **kwargs)
        found[estimate.gradient_checkpointing] = max(estimate.peak_reserved, int(1.03 * estimate.peak_allocated))
        return estimate

    monkeypatch.setattr(prediction, "estimate_of", noting)
    for mode in (False, "selective", True):
        run(gradient_checkpointing=mode, max_steps=1)
    return found


@pytest.mark.slow
def test_auto_takes_the_first_that_fits_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = needs(monkeypatch)
    assert needed[False] > needed["selective"] > needed[True]
    model = make_model()
    weights = sum(p.numel() * 4 for p in model.parameters()) + LoRA().num_parameters(describe(model)) * 4
    losses = set()
    for mode, need in needed.items():
        monkeypatch.setattr(prediction, "free_memory", lambda _, need=need: need + 16 - weights)
        folder = tmp_path / str(mode)
        result, printed = run(output_dir=folder)
        assert result.gradient_checkpointing == mode
        assert json.loads((folder / "environment.json").read_text())["gradient_checkpointing"] == mode
        assert json.loads((folder / "result.json").read_text())["gradient_checkpointing"] == mode
        said = [line for line in printed.splitlines() if line.startswith("gradient checkpointing: ")]
        assert len(said) == (0 if mode is False else 1)
        if said:
            assert ("(selective)" if mode == "selective" else "(true)") in said[0]
            for part in ("recomputed", "predicted", "would be taken if nothing is recomputed", "is free"):
                assert part in said[0]
        assert result.predicted_memory_bytes["peak_allocated"] == pytest.approx(
            result.peak_memory_bytes["train_allocated"], rel=0.03
        )
        losses.add((result.train_loss, result.valid_loss))
    assert len(losses) == 1
    monkeypatch.setattr(prediction, "free_memory", lambda _: int(0.9 * needed[True]) - weights)
    with pytest.raises(DoesNotFitError, match=r"\(every block is recomputed \(true\)\)") as error:
        run()
    assert "gradient_checkpointing=" not in str(error.value)  # all was tried
    with pytest.raises(DoesNotFitError, match="gradient_checkpointing=auto"):
        run(gradient_checkpointing=False)


@pytest.mark.slow
def test_what_is_asked_for_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "free_memory", lambda _: 2**40)
    for mode in (False, "selective", True):
        result, printed = run(gradient_checkpointing=mode)
        assert result.gradient_checkpointing == mode
        assert "gradient checkpointing" not in printed
    assert run()[0].gradient_checkpointing is False
    assert run(memory_check="off")[0].gradient_checkpointing is False
    model = make_model()
    checkpointed_by_transformers(model)  # the user's own wish
    assert run(model=model)[0].gradient_checkpointing is True
    with pytest.raises(ConfigError, match="offload needs a CUDA device"):
        run(gradient_checkpointing="offload")


def test_what_cannot_be_planned_recomputes_nothing_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prediction, "estimate_of", lambda *_, **__: 1 / 0)
    assert run()[0].gradient_checkpointing is False
    assert run(gradient_checkpointing=True)[0].gradient_checkpointing is True
    assert "not predicted" in caplog.text


@pytest.mark.parametrize(
    "method",
    others_slow(("full", "lora", "prefix", "prompt", "adapter"), ("lora", "prefix")),
)
def test_a_run_may_go_on_in_another_way_and_its_numbers_do_not_change(method: str, tmp_path: Path) -> None:
    whole, _ = run(method, max_steps=4, gradient_checkpointing=False)
    folder = tmp_path / "run"
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "output_dir": folder}
    run(method, **settings, gradient_checkpointing="selective")
    for name in ("result.json", "best"):
        path = folder / name
        path.unlink() if path.is_file() or path.is_symlink() else None
    result, printed = run(method, **settings, gradient_checkpointing=True, resume=True)
    assert "going on from" in printed
    assert (result.train_loss, result.valid_loss) == (whole.train_loss, whole.valid_loss)


def test_what_the_compiler_is_told() -> None:
    assert [memory_budget(mode) for mode in (False, "selective", True, "offload")] == [1.0, 0.5, 0.0, 1.0]


def test_settings_are_checked() -> None:
    assert TrainingConfig().gradient_checkpointing == "auto"
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        TrainingConfig(gradient_checkpointing="sometimes")
