"""A comparison end to end on a tiny model: all methods, a failure in between, resumption."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spectune.comparing import Comparison, final_runs, job, measure
from spectune.deltas import RatePoint, RateRule, attached
from spectune.errors import ConfigError, DataError, DivergedError, DoesNotFitError, InterruptedRun
from spectune.evaluation import read_rows
from spectune.methods import LoRA, PrefixTuning, PromptTuning
from spectune.phases import Phases
from spectune.results import ComparisonResult
from spectune.results.time_spent import time_spent
from spectune.training import TrainingConfig
from tests.comparing.small import SEARCHED, SIX_STEPS, SMALL, run, timeless
from tests.support import make_model, make_rows

pytestmark = pytest.mark.usefixtures("short_measurements")


@pytest.mark.usefixtures("with_reports")
def test_all_methods_side_by_side(tmp_path: Path) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    found = run(tmp_path / "c", model)
    assert [r["method"] for r in found.runs] == [getattr(method, "name", method) for method in SMALL]
    assert not found.failed
    assert not attached(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    base_losses = {round(r["base_valid_loss"], 6) for r in found.runs}
    assert len(base_losses) == 1  # every method starts from the same base, measured on the same rows
    tokens = {r["train_tokens"] for r in found.runs}
    assert len(tokens) == 1  # the same batches for all
    for r in found.runs:
        assert r["forgetting_kl_nats_per_token"] >= 0
        assert r["decode_tokens_per_second"] > 0
        assert r["decode_tokens_per_second_base_spread"] >= 0
        low, high = r["inference_overhead_range"]
        assert -1 < low <= high
        assert (r["decode_tokens_per_second_merged"] is not None) == (r["method"] in ("full", "lora", "bitfit", "dora"))
        [folder] = (tmp_path / "c" / "runs" / r["name"]).glob("seed-0-*")
        assert (folder / "best").exists()
        assert len(read_rows(tmp_path / "c" / r["rows_file"])) == 6
        assert r["judged_loss"] == pytest.approx(r["valid_loss"], rel=1e-5)
    files = {p.name for p in (tmp_path / "c").iterdir()}
    expected = {"conditions.json", "base", "runs", "comparison.json", "comparison.csv", "comparison.md"}
    assert expected | {"shares-and-performance.png"} <= files
    assert Comparison.load(tmp_path / "c").content == found.content
    # two of the six judged rows are written: the others have nothing to show
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "2 of the 2 rows that every method wrote" in page
    for name in ("report.html", "comparison.md", "comparison.csv", "runs.csv"):
        text = (tmp_path / "c" / name).read_text(encoding="utf-8")
        assert not re.findall(r".{30}\b(?:None|nan|NaN)\b.{30}", text), name


def test_a_failed_run_stays_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = job.train

    def train(model: Any, tokenizer: Any, delta: Any, *args: Any, **kwargs: Any) -> Any:
        if delta.method.name == "lora":
            raise DivergedError("the loss is nan in step 3")
        return real(model, tokenizer, delta, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train", train)
        found = run(tmp_path / "c", methods=[LoRA(r=2), "bitfit"])
    assert [f["reason"] for f in found.failed] == ["the loss is nan in step 3"]
    assert [r["method"] for r in found.runs] == ["bitfit"]
    again = run(tmp_path / "c", methods=[LoRA(r=2), "bitfit"], resume=True)
    assert not again.failed
    assert [r["method"] for r in again.runs] == ["lora", "bitfit"]
    assert again.runs[1] == found.runs[0]  # the run that had ended was not run again


def test_the_same_method_twice(tmp_path: Path) -> None:
    found = run(tmp_path / "c", methods=[LoRA(r=1), LoRA(r=2)])
    assert [r["name"] for r in found.runs] == ["lora", "lora-2"]


def test_what_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        run(tmp_path / "c", methods=["lroa"])
    (tmp_path / "c").mkdir(exist_ok=True)
    (tmp_path / "c" / "x").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        run(tmp_path / "c")
    with pytest.raises(DataError, match="no such file"):
        run(tmp_path / "d", methods=["bitfit"], retain=tmp_path / "none.txt")


def test_own_text_for_forgetting(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Ada lives in Leeds.\n\nThe quick brown fox jumps.\n")
    found = run(tmp_path / "c", methods=["bitfit"], retain=tmp_path / "own.txt")
    assert found.content["data"]["retained_passages"] == 2


def test_an_interruption_while_measuring_leaves_the_trained_delta_to_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", methods=[LoRA(r=2), "full"])

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(final_runs, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "c", methods=[LoRA(r=2)])
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "c", methods=["full"], resume=True)
    found = run(tmp_path / "c", methods=[LoRA(r=2), "full"], resume=True)
    for ours, theirs in zip(found.runs, whole.runs, strict=True):
        assert theirs["forgetting_kl_nats_per_token"] > 0
        assert ours["forgetting_kl_nats_per_token"] == pytest.approx(theirs["forgetting_kl_nats_per_token"], rel=1e-6)


def test_resuming_with_other_settings_is_refused_before_anything_runs(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=[LoRA(r=2)])
    written = (tmp_path / "c" / "comparison.json").read_text()
    (tmp_path / "own.txt").write_text("Ada lives in Leeds.")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"config": TrainingConfig(max_steps=9, learning_rate=1e-2)}, "max_steps: 6 in the comparison, 9 now"),
        ({"methods": ["bitfit", LoRA(r=4)]}, r"lora\.r: 2 in the comparison, 4 now"),
        ({"retain": tmp_path / "own.txt"}, "measured on other passages"),
    ]
    for changes, expected in refused:
        with pytest.raises(ConfigError, match=expected):
            run(tmp_path / "c", resume=True, **{"methods": ["bitfit", LoRA(r=2)], **changes})
        assert not (tmp_path / "c" / "runs" / "bitfit").exists()
        assert (tmp_path / "c" / "comparison.json").read_text() == written


def test_seed_folder_and_resume_of_the_config_count(tmp_path: Path) -> None:
    config = TrainingConfig(max_steps=2, learning_rate=1e-2, seed=5, output_dir=tmp_path / "c", memory_check="off")
    found = run(tmp_path / "unused", methods=["bitfit"], config=config, output_dir=None)
    assert found.folder == tmp_path / "c"
    assert found.runs[0]["seed"] == 5
    again = config.model_copy(update={"resume": True})
    assert run(tmp_path / "unused", methods=["bitfit"], config=again, output_dir=None).runs == found.runs
    assert run(tmp_path / "d", methods=["bitfit"], config=config, seed=3).runs[0]["seed"] == 3


def test_the_embedded_base_as_an_object_has_its_own_passages() -> None:
    from spectune import embedded
    from spectune.comparing.measure import retained_passages
    from spectune.storage import load

    model, tokenizer = load("spectune-tiny")
    shipped = embedded.RETAINED.read_text().splitlines()
    assert len(retained_passages(model, tokenizer, None, 0)) == len(shipped)


def test_a_failed_run_is_not_warned_of_where_a_console_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = [LoRA(r=2, target_modules=["nothing"]), "bitfit"]
    assert run(tmp_path / "c", methods=failing).failed
    assert not caplog.records


@pytest.mark.usefixtures("with_reports")
def test_a_run_that_diverges_in_validation_fails_alone_and_the_files_are_strict_json(tmp_path: Path) -> None:
    config = TrainingConfig(max_steps=1, learning_rate=1e30, per_device_train_batch_size=4, memory_check="off")
    found = run(tmp_path / "c", methods=["bitfit", "lora"], config=config)
    assert {f["method"] for f in found.failed} == {"bitfit", "lora"}
    Comparison(tmp_path / "c", ComparisonResult.model_validate({**found.content, "extra": float("nan")})).save()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "c" / "comparison.json").read_text(), parse_constant=refuse)


def test_search_seeds_and_curve(tmp_path: Path) -> None:
    found = run(
        tmp_path / "c", methods=["lora", "bitfit"], config=SEARCHED, preset="default", seeds=2, fractions=[8, 1]
    )
    assert [(r["name"], r["seed"]) for r in found.runs] == [("lora", 0), ("lora", 1), ("bitfit", 0), ("bitfit", 1)]
    for name, search in found.content["searches"].items():
        planned = [t["steps"] for t in search["trials"] if not t["extension"]]
        assert planned == [1] * 8 + [2] * 4 + [4] * 2
        rates = {r["learning_rate"] for r in found.runs if r["name"] == name}
        assert rates == {search["best"]}
    # the same budget for every method, in target tokens
    tokens = [
        sum(t["target_tokens"] for t in s["trials"] if not t["extension"]) for s in found.content["searches"].values()
    ]
    assert tokens[0] == tokens[1]
    assert [(c["name"], c["rows"]) for c in found.content["curves"]][:2] == [("lora", 8), ("lora", 24)]
    assert found.content["preset"]["covers_training_noise"]
    assert found.content["verdict"]["seeds"] == 2
    assert found.content["missing"] == []


def test_a_killed_comparison_goes_on_and_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"methods": ["lora", "bitfit"], "config": SEARCHED, "preset": "quick", "seeds": 1}
    whole = run(tmp_path / "whole", **given)
    real = job.train
    calls: list[int] = []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) % 4 == 0:
            raise InterruptedRun("SIGTERM after step 1 of 2.")
        return real(*args, **kwargs)

    monkeypatch.setattr(job, "train", killed)
    for _ in range(3):
        with pytest.raises(InterruptedRun, match="--resume"):
            run(tmp_path / "c", resume=True, **given)
        assert Comparison.from_runs(tmp_path / "c").content["missing"]  # what is there can be looked at
    monkeypatch.setattr(job, "train", real)
    found = run(tmp_path / "c", resume=True, **given)
    for ours, theirs in zip(found.runs, whole.runs, strict=True):
        assert ours["judged_loss"] == theirs["judged_loss"]
        assert ours["key"] == theirs["key"]
    assert timeless(found.content["searches"]) == timeless(whole.content["searches"])


def test_more_seeds_are_added_and_nothing_is_run_twice(tmp_path: Path) -> None:
    first = run(tmp_path / "c", methods=["bitfit"])
    both = run(tmp_path / "c", methods=["bitfit", LoRA(r=2)], seeds=2, resume=True)
    assert both.runs[0] == first.runs[0]
    assert [(r["name"], r["seed"]) for r in both.runs] == [("bitfit", 0), ("bitfit", 1), ("lora", 0), ("lora", 1)]


def test_a_report_is_made_anew_from_the_runs_alone(tmp_path: Path) -> None:
    found = run(tmp_path / "c", methods=["bitfit", LoRA(r=2)])
    written = (tmp_path / "c" / "comparison.json").read_text()
    for path in (tmp_path / "c").glob("comparison.*"):
        path.unlink()
    again = Comparison.from_runs(tmp_path / "c")
    again.save()
    assert again.content == found.content
    assert (tmp_path / "c" / "comparison.json").read_text() == written


def test_test_rows_are_judged_and_choose_nothing(tmp_path: Path) -> None:
    found = run(tmp_path / "c", methods=["bitfit"], test_rows=make_rows(9)[6:])
    assert found.content["data"]["judged_on"] == "test"
    [r] = found.runs
    assert len(read_rows(tmp_path / "c" / r["rows_file"])) == 3
    assert r["judged_loss"] != r["valid_loss"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"preset": "fast"}, "preset 'fast'; expected one of quick, default, thorough"),
        ({"seeds": 0}, "seeds = 0; expected at least 1"),
        ({"fractions": [0.5, -1]}, "fractions -1; expected shares"),
        ({"fractions": [2.5]}, r"fractions 2\.5; expected shares"),
        ({"fractions": [float("nan"), float("inf")]}, "fractions nan, inf; expected shares"),
        ({"methods": []}, "no method to compare; expected some of full"),
        ({"methods": [PromptTuning(num_virtual_tokens=63)]}, "takes 63 virtual tokens, and this base has 64 positions"),
        ({"metric": "bleurt"}, "metric 'bleurt'"),
    ],
)
def test_wrong_settings_of_a_comparison(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "c", **{"methods": ["bitfit"], **changes})
    assert not (tmp_path / "c").exists()


def test_where_every_rate_diverges_the_method_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoRA, "learning_rates", RateRule((RatePoint(1, 1e30, "a test"),)))
    found = run(tmp_path / "c", methods=[LoRA(r=2), "bitfit"], config=SEARCHED, preset="default")
    [failed] = found.failed
    assert failed["name"] == "lora"
    assert "diverged" in failed["reason"]
    assert [r["name"] for r in found.runs] == ["bitfit"]
    assert all(t["valid_loss"] is None for t in found.content["searches"]["lora"]["trials"])


def test_the_plan_is_asked_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectune.training import prediction

    checked = SIX_STEPS.model_copy(update={"memory_check": "refuse"})
    trained: list[str] = []

    def train(*args: Any, **kwargs: Any) -> Any:
        trained.append("one")
        raise DivergedError("not meant to be reached by those that do not fit")

    monkeypatch.setattr(job, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "free_memory", lambda device: 1000)
        with pytest.raises(DoesNotFitError, match="BitFit with a batch of 4 rows"):
            run(tmp_path / "c", methods=["bitfit"], config=checked)
    assert trained == []
    real = job.check_memory

    def only_lora(predicted: Any, delta: Any, check: str) -> None:
        if delta.method.name == "lora":
            raise DoesNotFitError("LoRA does not fit")
        real(predicted, delta, check)

    monkeypatch.setattr(job, "check_memory", only_lora)
    found = run(tmp_path / "d", methods=[LoRA(r=2), "bitfit"], config=checked)
    assert found.failed[0]["reason"] == "LoRA does not fit"
    assert found.failed[1]["name"] == "bitfit"


def test_passages_leave_room_for_virtual_tokens_on_a_base_of_few_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PASSAGE_TOKENS", 128)
    found = run(tmp_path / "c", methods=["bitfit", PrefixTuning(num_virtual_tokens=4)])
    assert not found.failed
    assert found.content["data"]["retained_tokens"] == 2 * 60


def test_test_rows_that_are_cut_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SIX_STEPS.model_copy(update={"max_length": 16})
    run(tmp_path / "c", methods=["bitfit"], config=config, test_rows=make_rows(3), console=Console())
    assert "test: 3 of 3 rows cut to max_length" in capsys.readouterr().out


def test_the_time_is_told_by_a_method_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = job.train

    def check(predicted: Any, delta: Any, check: str) -> None:
        if delta.method.name == "lora":
            raise DoesNotFitError("LoRA does not fit")

    def train(model: Any, tokenizer: Any, delta: Any, *args: Any, **kwargs: Any) -> Any:
        check(None, delta, "")
        return real(model, tokenizer, delta, *args, **kwargs)

    monkeypatch.setattr(job, "check_memory", check)
    monkeypatch.setattr(job, "train", train)
    run(tmp_path / "c", methods=[LoRA(r=2), "bitfit"], console=Console())
    assert "by two steps of BitFit" in capsys.readouterr().out


def test_where_the_first_seed_fails_the_budget_ends_and_the_next_one_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = job.train

    def train(model: Any, tokenizer: Any, delta: Any, rows: Any, valid: Any, config: Any, **kwargs: Any) -> Any:
        if config.seed == 0 and config.max_steps == 6:
            raise DivergedError("the loss is nan in step 3")
        return real(model, tokenizer, delta, rows, valid, config, **kwargs)

    monkeypatch.setattr(job, "train", train)
    found = run(tmp_path / "c", methods=["bitfit"], seeds=2, console=Console())
    assert [run["seed"] for run in found.runs] == [1]
    assert found.runs[0]["decode"]["1"]["tuned"] > 0
    assert "100% of the budget done\n" in capsys.readouterr().out


def test_a_point_of_the_curve_that_stopped_early_is_there(tmp_path: Path) -> None:
    config = SIX_STEPS.model_copy(update={"max_steps": 10, "learning_rate": 1e-12, "early_stopping_patience": 1})
    found = run(tmp_path / "c", methods=["bitfit"], config=config, fractions=[8])
    [point] = found.content["curves"]
    assert point["steps"] < 10


def test_short_runs_warm_up_for_the_same_share_of_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = job.train, set()

    def train(model: Any, tokenizer: Any, delta: Any, rows: Any, valid: Any, config: Any, **kwargs: Any) -> Any:
        seen.add((config.max_steps, config.warmup_steps))
        return real(model, tokenizer, delta, rows, valid, config, **kwargs)

    monkeypatch.setattr(job, "train", train)
    config = SEARCHED.model_copy(update={"warmup_steps": 8.0})
    run(tmp_path / "c", methods=["bitfit"], config=config, preset="quick")
    assert {(2, 1), (16, 8)} <= seen


def test_a_metric_where_less_is_better_is_judged_so(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def length(prediction, references, row):\n    return len(prediction)\n\n\n")
    file.write_text(file.read_text() + "length.higher_is_better = False\n")
    found = run(tmp_path / "c", methods=["bitfit", "full"], metric=f"{file}:length", generate_rows=6)
    verdict = found.content["verdict"]["metrics"]["length"]
    assert verdict["higher_is_better"] is False
    means = [arm["mean"] for arm in verdict["arms"]]
    assert means == sorted(means)
    assert means[0] < means[1]


def test_the_seconds_of_all_phases_are_the_time_that_passed_and_a_resumption_adds_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by a second whenever it is asked, so that nothing here is timed."""
    ticks = itertools.count()
    monkeypatch.setattr(Phases.__init__, "__defaults__", (lambda: float(next(ticks)),))
    found = run(tmp_path / "c", methods=[LoRA(r=2), "bitfit"], config=SEARCHED, preset="quick")
    spent = time_spent(found.result)
    assert list(spent) == ["LoRA", "BitFit", "Shared", "Total"]
    passed = next(ticks)
    # but for the last question, after which the verdict was made
    assert sum(spent["Total"].values()) == pytest.approx(passed, abs=2)
    for arm in ("LoRA", "BitFit"):
        assert {"prove", "steps", "validation", "judge", "generate", "forget", "costs", "save"} <= set(spent[arm])
    assert {"rows", "load", "judge", "generate", "forget", "validation"} <= set(spent["Shared"])
    [lora, _] = found.result.runs
    trials = found.result.searches["lora"].trials
    assert sum(spent["LoRA"].values()) == sum(lora.seconds_by_phase.values()) + sum(
        sum(trial.seconds_by_phase.values()) for trial in trials
    )
    given: dict[str, Any] = {"config": SEARCHED, "preset": "quick", "resume": True}
    again = run(tmp_path / "c", methods=[LoRA(r=2), "bitfit"], **given)
    assert again.content == found.content  # nothing was left to do
    more = time_spent(run(tmp_path / "c", methods=[LoRA(r=2), "bitfit", "ia3"], **given).result)
    assert more["LoRA"] == spent["LoRA"]
    assert sum(more["Shared"].values()) > sum(spent["Shared"].values())
