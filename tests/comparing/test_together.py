"""A comparison whose runs share passes: what it says, and what lies in its folder, is what it is without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.comparing import ahead
from spectune.errors import DivergedError, InterruptedRun, OutOfMemoryError, RunsFailedError
from spectune.methods import BottleneckAdapter, LoRA, PromptTuning
from spectune.results import ComparisonResult, RunResult
from spectune.results.arm_result import arm_results
from tests.comparing.small import SEARCHED, SIX_STEPS, run

pytestmark = pytest.mark.usefixtures("short_measurements")

METHODS: list[Any] = [LoRA(r=2), PromptTuning(num_virtual_tokens=4)]
EIGHT_STEPS = SEARCHED.model_copy(update={"max_steps": 8})
#: of losses, which differ by rounding
NEAR = 1e-5


def names(folder: Path) -> set[str]:
    """The folders of runs, trials and points in a comparison's."""
    found = [path.parent for path in folder.rglob("result.json")]
    return {path.relative_to(folder).as_posix() for path in found}


def losses(found: Any) -> list[float]:
    content = found.content
    trials = [trial["valid_loss"] for search in content["searches"].values() for trial in search["trials"]]
    runs = [loss for run in content["runs"] for loss in (run["valid_loss"], run["judged_loss"], run["train_loss"])]
    kl = [run["forgetting_kl_nats_per_token"] for run in content["runs"]]
    return [*trials, *runs, *kl, *(point["valid_loss"] for point in content["curves"])]


def test_what_is_found_is_what_is_found_without(tmp_path: Path) -> None:
    """Searches, final runs of two seeds and a data curve."""
    how: dict[str, Any] = {"methods": METHODS, "config": EIGHT_STEPS, "preset": "quick", "seeds": 2}
    how |= {"fractions": (0.5,), "generate_rows": 0}
    alone, shared = run(tmp_path / "a", **how), run(tmp_path / "b", together=16, **how)
    assert not shared.failed
    assert names(tmp_path / "b") == names(tmp_path / "a")
    assert losses(shared) == pytest.approx(losses(alone), abs=NEAR)
    rates = [[search["best"] for search in found.content["searches"].values()] for found in (alone, shared)]
    assert rates[0] == rates[1]
    order = [[arm["name"] for arm in found.content["verdict"]["arms"]] for found in (alone, shared)]
    assert order[0] == order[1]
    together = {run["name"]: run["trained_together"] for run in shared.content["runs"]}
    assert together == {"lora": 4, "prompt": 4}
    check_no_time_of_a_shared_pass_is_shown(shared.result)
    # it has ended: nothing is made again, whether runs would share passes or not
    again = run(tmp_path / "b", resume=True, **how)
    assert again.content["runs"] == shared.content["runs"]


def check_no_time_of_a_shared_pass_is_shown(content: ComparisonResult) -> None:
    """Speed and memory of an arm are those of the run of it that took some steps by itself."""
    for arm in arm_results(content):
        runs = [run for run in content.runs if run.name == arm.name and run.shared]
        if not runs:
            continue
        measured = [run for run in runs if run.train_tokens_per_second_alone]
        assert len(measured) == 1
        assert arm.train_tokens_per_second == measured[0].train_tokens_per_second_alone
        assert arm.train_memory_bytes == measured[0].peak_memory_bytes["train_allocated"]
        tokens, speed = measured[0].train_tokens, measured[0].train_tokens_per_second_alone
        assert tokens is not None
        assert speed is not None
        assert arm.train_seconds == tokens / speed
        others = [run for run in runs if run not in measured]
        assert not any(key.startswith(("train_", "valid_")) for run in others for key in run.peak_memory_bytes)
        assert not any("train" in run.machine_load for run in others)


def test_a_run_that_diverges_fails_and_the_others_are_as_without_it(tmp_path: Path) -> None:
    methods = {"wild": LoRA(r=2), "tame": LoRA(r=2), "prompt": PromptTuning(num_virtual_tokens=4)}
    real = ahead.train_together

    def wild(model: Any, tokenizer: Any, runs: Any, **given: Any) -> list[RunResult]:
        results = real(model, tokenizer, runs, **given)
        (number,) = (n for n, each in enumerate(runs) if each.method.name.startswith("wild"))
        raise RunsFailedError(
            {runs[number].method.name: DivergedError("the loss is nan in step 2")},
            [result for n, result in enumerate(results) if n != number],
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "train_together", wild)
        found = run(tmp_path / "c", methods=methods, together=4, generate_rows=0)
    assert [(failed["name"], failed["reason"]) for failed in found.failed] == [("wild", "the loss is nan in step 2")]
    assert [(each["name"], each["trained_together"]) for each in found.runs] == [("tame", 3), ("prompt", 3)]


def test_where_memory_is_short_fewer_share_a_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    real, counts = ahead.train_together, list[int]()

    def small(model: Any, tokenizer: Any, runs: Any, **given: Any) -> list[RunResult]:
        counts.append(len(runs))
        if len(runs) > 2:
            raise OutOfMemoryError("out of memory in step 1")
        return real(model, tokenizer, runs, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "train_together", small)
        found = run(tmp_path / "c", methods=[LoRA(r=r) for r in (1, 2, 3, 4)], together=4, generate_rows=0)
    assert counts == [4, 2, 2]
    assert [each["trained_together"] for each in found.runs] == [2, 2, 2, 2]
    assert "2 runs share a pass from now on, not 4: out of memory in step 1" in caplog.text


def test_an_interrupted_comparison_goes_on_with_and_without_shared_passes(tmp_path: Path) -> None:
    methods: list[Any] = [LoRA(r=2), PromptTuning(num_virtual_tokens=4)]
    saving = SIX_STEPS.model_copy(update={"save_steps": 2, "eval_steps": 3})
    how: dict[str, Any] = {"methods": methods, "config": saving, "generate_rows": 0}
    found = []
    from spectune.training.rounds import Rounds

    real = Rounds._round

    def stopping(self: Any, living: Any) -> None:
        if living[0].loop.run.progress.step == 3:
            raise InterruptedRun("a signal came")
        real(self, living)

    for name in ("with", "without"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rounds, "_round", stopping)
            with pytest.raises(InterruptedRun, match="--resume"):
                run(tmp_path / name, together=4, **how)
        there = [json.loads(path.read_text()) for path in (tmp_path / name).rglob("result.json")]
        assert there == []
        found.append(run(tmp_path / name, together=4 if name == "with" else None, resume=True, **how))
    assert losses(found[0]) == pytest.approx(losses(found[1]), abs=NEAR)
    assert [run["steps"] for run in found[0].runs] == [6, 6]


def test_who_cannot_share_a_pass_is_trained_by_itself_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods: list[Any] = [BottleneckAdapter(bottleneck_dim=4, dropout=0.5), "full", LoRA(r=2), LoRA(r=1)]
    found = run(tmp_path / "c", methods=methods, together=4, generate_rows=0, console=Console(width=200))
    assert [each["trained_together"] for each in found.runs] == [1, 1, 2, 2]
    said = capsys.readouterr().out
    assert "Adapter: each run is trained by itself: random numbers are drawn" in said
    assert "Full: each run is trained by itself: Full trains the base itself" in said


def test_auto_leaves_runs_by_themselves_where_shared_passes_gain_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = SIX_STEPS.model_copy(update={"max_steps": 1})
    how: dict[str, Any] = {"methods": [LoRA(r=1), LoRA(r=2)], "config": few, "generate_rows": 0}
    found = run(tmp_path / "c", together="auto", console=Console(width=200), **how)
    assert [each["trained_together"] for each in found.runs] == [1, 1]
    assert "each run is trained by itself: shared passes gain nothing here (cpu)" in capsys.readouterr().out
