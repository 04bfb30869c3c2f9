"""Going on with a comparison: what is taken over, what is not, and what is damaged."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectune.comparing import Comparison, final_runs, job
from spectune.errors import ConfigError, DataError, DivergedError, InterruptedRun, WriteError
from spectune.methods import LoRA, PrefixTuning
from spectune.results import Limits
from tests.comparing.small import SEARCHED, SIX_STEPS, run, timeless
from tests.support import make_model, make_rows

pytestmark = pytest.mark.usefixtures("short_measurements")


def with_references(references: list[str]) -> list[dict[str, Any]]:
    return [{**row, "references": references} for row in make_rows(3)]


def test_another_base_of_the_same_name_and_size_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=["bitfit"])
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    with pytest.raises(ConfigError, match="base: 8 of 8 linears differ"):
        run(tmp_path / "c", other, methods=["bitfit"], resume=True)


def test_other_references_are_other_judged_rows(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=["bitfit"], test_rows=with_references(["one"]))
    with pytest.raises(ConfigError, match="judged_rows: other rows"):
        run(tmp_path / "c", methods=["bitfit"], test_rows=with_references(["two"]), resume=True)


def test_where_the_file_of_a_metric_has_changed_runs_are_judged_again_and_not_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def length(prediction, references, row):\n    return 1 + len(prediction)\n")
    given: dict[str, Any] = {"methods": ["bitfit"], "metric": f"{file}:length"}
    first = run(tmp_path / "c", **given)
    assert run(tmp_path / "c", resume=True, **given).content == first.content
    file.write_text("def length(prediction, references, row):\n    return -1 - len(prediction)\n")
    again = run(tmp_path / "c", resume=True, **given)
    assert again.runs[0]["metrics"]["length"] == -first.runs[0]["metrics"]["length"]
    assert again.content["base"]["metrics"]["length"] == -first.content["base"]["metrics"]["length"]
    assert again.runs[0]["train_seconds"] == first.runs[0]["train_seconds"]
    assert again.runs[0]["judged_loss"] == first.runs[0]["judged_loss"]
    file.write_text(f"import os\nos.mkdir({str(tmp_path / 'it ran')!r})\nraise SystemExit(5)\n")
    with pytest.raises(ConfigError, match="generated_rows: 2 in the comparison, 1 now"):
        run(tmp_path / "c", resume=True, generate_rows=1, **given)
    assert not (tmp_path / "it ran").exists(), "code ran before the conditions were compared"
    with pytest.raises(ConfigError, match=r"own\.py cannot be imported: SystemExit: 5"):
        run(tmp_path / "c", resume=True, **given)


def test_another_metric_is_named_alone(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=["bitfit"], metric="rouge_l")
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "c", methods=["bitfit"], metric="bleu", resume=True)
    assert "judged.metrics" in str(caught.value)
    assert "generated_rows" not in str(caught.value)


def test_another_kind_of_device_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=["bitfit"])
    path = tmp_path / "c" / "conditions.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))
    with pytest.raises(ConfigError, match="device: cuda in the comparison, cpu now"):
        run(tmp_path / "c", methods=["bitfit"], resume=True)


def test_limits_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=["bitfit"], limits=Limits(max_stored_bytes=1))
    again = run(tmp_path / "c", methods=["bitfit"], resume=True)
    assert again.content["recommendation"]["limits"] == {"max_stored_bytes": 1}
    other = run(tmp_path / "c", methods=["bitfit"], resume=True, limits=Limits(tenants=2))
    assert other.content["recommendation"]["limits"] == {"tenants": 2}


def test_fewer_methods_go_on_though_they_leave_more_room_for_rows(tmp_path: Path) -> None:
    run(tmp_path / "c", methods=["bitfit", PrefixTuning(num_virtual_tokens=4)])
    again = run(tmp_path / "c", methods=["bitfit"], resume=True)
    assert again.content["settings"]["max_length"] == 60


def test_a_run_under_an_arms_former_settings_is_not_taken(tmp_path: Path) -> None:
    first = run(tmp_path / "c", methods=[LoRA(r=2)])
    run(tmp_path / "c", methods=["bitfit"], resume=True)
    run(tmp_path / "c", methods=[LoRA(r=1)], resume=True)  # newer, of the same name, rate, steps and seed
    run(tmp_path / "c", methods=["bitfit"], resume=True)
    assert run(tmp_path / "c", methods=[LoRA(r=2)], resume=True).runs == first.runs


def test_what_was_searched_is_not_shown_where_the_rate_is_given(tmp_path: Path) -> None:
    searched = run(tmp_path / "c", methods=["bitfit"], config=SEARCHED, preset="quick")
    assert set(searched.content["searches"]) == {"bitfit"}
    fixed = SEARCHED.model_copy(update={"learning_rate": 1e-3})
    assert run(tmp_path / "c", methods=["bitfit"], config=fixed, preset="quick", resume=True).content["searches"] == {}


@pytest.mark.parametrize("file", ["comparison.json", "result.json"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / file).write_text("{}")
    with pytest.raises(ConfigError, match=rf"c holds {file} and no conditions\.json"):
        run(tmp_path / "c", methods=["bitfit"], resume=True)
    assert [path.name for path in (tmp_path / "c").iterdir()] == [file]


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_is_no_folder(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "c").write_text("x")
    with pytest.raises(ConfigError, match="c is a file"):
        run(tmp_path / "c", methods=["bitfit"], resume=resume)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"identity": {}}'])
def test_damaged_conditions(tmp_path: Path, text: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "conditions.json").write_text(text)
    with pytest.raises(DataError, match="cannot be read as the conditions of a comparison"):
        run(tmp_path / "c", methods=["bitfit"], resume=True)
    with pytest.raises(DataError, match="cannot be read as the conditions of a comparison"):
        Comparison.from_runs(tmp_path / "c")


@pytest.mark.slow
def test_damaged_results(tmp_path: Path) -> None:
    """Rows and small results are made anew; a run's result is only removed by the user, and made anew then."""
    given: dict[str, Any] = {"methods": ["bitfit"], "config": SEARCHED, "preset": "quick", "fractions": [8]}
    whole = run(tmp_path / "c", **given)
    [curve] = (tmp_path / "c" / "curve" / "bitfit").glob("*/result.json")
    trial = min((tmp_path / "c" / "search" / "bitfit").glob("*/result.json"))
    rows = tmp_path / "c" / whole.runs[0]["rows_file"]
    for path, texts in (
        (trial, ["{", "[]", "{}"]),
        (curve, ["{", "[]", "{}"]),
        (rows, ["{", "", rows.read_text().splitlines()[0]]),
    ):
        for text in texts:
            path.write_text(text)
            again = run(tmp_path / "c", resume=True, **given)
            for part in ("searches", "curves"):
                assert timeless(again.content[part]) == timeless(whole.content[part])
            assert again.runs[0]["judged_loss"] == whole.runs[0]["judged_loss"]
            assert again.content["verdict"]["sentences"] == whole.content["verdict"]["sentences"]
    result = rows.parent / "result.json"
    result.write_text('{"method": 1}')
    with pytest.raises(
        DataError, match=r"result\.json is not a run's result \(method: .*Remove it and resume"
    ) as caught:
        run(tmp_path / "c", resume=True, **given)
    assert len(str(caught.value).splitlines()) == 1
    result.unlink()
    assert run(tmp_path / "c", resume=True, **given).runs[0]["judged_loss"] == whole.runs[0]["judged_loss"]
    (tmp_path / "c" / "search" / "bitfit" / "search.json").write_text("[]")
    with pytest.raises(DataError, match=r"search\.json cannot be read as a search: it holds a list"):
        Comparison.from_runs(tmp_path / "c")


def test_the_bases_rows_are_judged_again_where_they_are_gone(tmp_path: Path) -> None:
    first = run(tmp_path / "c", methods=["bitfit"])
    (tmp_path / "c" / "base" / "rows.jsonl").unlink()
    again = run(tmp_path / "c", methods=["bitfit"], resume=True)
    assert again.content["verdict"]["base"] == first.content["verdict"]["base"]


def test_an_interruption_says_where_the_comparison_lies_and_nothing_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise InterruptedRun("Nothing was written, because the run has no output_dir.")

    monkeypatch.setattr(job, "train", interrupted)
    with pytest.raises(InterruptedRun) as caught:
        run(tmp_path / "c", methods=["bitfit"])
    folder = tmp_path / "c"
    assert str(caught.value) == (
        f"the comparison is in {folder}. To go on: the same command with --output-dir {folder} --resume"
    )
    json.loads((folder / "conditions.json").read_text())
    assert Comparison.from_runs(folder).content["missing"] == [{"name": "bitfit", "seed": 0}]


def test_a_seed_that_was_not_reached_is_missing_though_another_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def failing(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # after the calibration
            raise InterruptedRun("SIGTERM")
        raise DivergedError("the loss is nan in step 3")

    monkeypatch.setattr(job, "train", failing)
    with pytest.raises(InterruptedRun):
        run(tmp_path / "c", methods=["bitfit"], seeds=2)
    found = Comparison.from_runs(tmp_path / "c")
    assert [run["seed"] for run in found.failed] == [0]
    assert found.content["missing"] == [{"name": "bitfit", "seed": 1}]


def test_saving_more_often_is_no_other_comparison(tmp_path: Path) -> None:
    first = run(tmp_path / "c", methods=["bitfit"])
    often = SIX_STEPS.model_copy(update={"save_steps": 2})
    assert run(tmp_path / "c", methods=["bitfit"], config=often, resume=True).runs == first.runs


def test_a_full_disk_ends_a_comparison_which_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the run that met it; and what a kill left lies there no more, then."""
    folder, write = tmp_path / "c", final_runs.write_rows

    def full(path: Path, *given: Any) -> Any:
        if "runs" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(final_runs, "write_rows", full)
        with pytest.raises(WriteError) as caught:
            run(folder, methods=["bitfit"])
    assert str(caught.value).startswith(f"{folder} could not be written: no space")
    assert f"--output-dir {folder} --resume goes on from there." in str(caught.value)
    assert not list(folder.rglob("failed.json"))
    [place] = folder.glob("runs/bitfit/*")
    for left in (place / ".result.json.0123456789ab.spectune-new", folder / ".plots.0123456789ab.spectune-new"):
        left.write_text("half")
    (place / ".best.4711").symlink_to("best-6")
    found = run(folder, methods=["bitfit"], resume=True)
    assert not found.failed
    assert not list(folder.rglob(".*"))
    assert found.runs[0]["judged_loss"] == run(tmp_path / "other", methods=["bitfit"]).runs[0]["judged_loss"]


def test_a_comparison_that_fails_before_it_starts_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run(tmp_path / "c", methods=["bitfit"], train_rows="nosuch.jsonl")
    assert not (tmp_path / "c").exists()


def test_a_trial_of_another_rate_is_not_taken_for_this_one_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"methods": ["bitfit"], "config": SEARCHED, "preset": "quick"}
    first = run(tmp_path / "c", **given)
    one, other = sorted((tmp_path / "c").glob("search/*/*/result.json"))[:2]
    one.write_bytes(other.read_bytes())
    again = run(tmp_path / "c", resume=True, **given)
    assert f"{one} is of another folder than the one that it stands in" in caplog.text
    assert timeless(again.content) == timeless(first.content)
