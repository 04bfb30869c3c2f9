"""What is read from the runs' folders: only what lies inside, and whatever of it is whole."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from spectune.reporting.artifacts import curve, judged_rows, run_folder
from spectune.results import ComparedRun
from tests.reporting.from_content import examples, write_reports
from tests.reporting.sample import GENERATED, ROWS, sample
from tests.reporting.test_plots import NAMES


def test_rows_and_curves_of_a_run(tmp_path: Path) -> None:
    case = sample(tmp_path)
    run = ComparedRun(**case["runs"][0])
    assert list(judged_rows(tmp_path, run)) == list(range(ROWS))
    found = curve(tmp_path, run)
    assert found is not None
    assert [step for step, _ in found.valid] == list(range(60, 481, 60))
    assert len(found.train) == 480


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "rows.jsonl").write_text('{"row": 0, "prediction": "secret"}\n')
    folder = tmp_path / "comparison"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret/rows.jsonl", str(tmp_path / "secret" / "rows.jsonl"), "link/rows.jsonl"):
        assert judged_rows(folder, ComparedRun(rows_file=path)) == {}


def test_a_comparison_that_was_moved_finds_its_runs(tmp_path: Path) -> None:
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    found = run_folder(tmp_path, ComparedRun(folder="/somewhere/else/runs/before/runs/lora"))
    assert found == tmp_path / "runs" / "lora"
    assert run_folder(tmp_path, ComparedRun(folder="/somewhere/else")) is None


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "valid_loss": None, "loss": 1.5}, {"step": 2, "valid_loss": 1.0}]
    (tmp_path / "runs" / "x").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'
    (tmp_path / "runs" / "x" / "metrics.jsonl").write_text(text)
    found = curve(tmp_path, ComparedRun(folder="runs/x"))
    assert found is not None
    assert (found.train, found.valid) == ([(1, 2.0), (2, 1.5)], [(2, 1.0)])


def test_examples_are_chosen_by_rule(tmp_path: Path) -> None:
    case = sample(tmp_path)
    found = examples(case, tmp_path)
    assert found is not None
    assert f"12 of the {GENERATED} rows" in found.rule
    assert "from the easiest row to the hardest" in found.rule
    bare = judged_rows(tmp_path, ComparedRun(rows_file="base/rows.jsonl"))
    losses = {row["origin"]: row["loss_sum"] / row["target_tokens"] for n, row in bare.items() if n < GENERATED}
    chosen = [losses[example.origin] for example in found.chosen]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (min(losses.values()), max(losses.values()))
    ranks = [sorted(losses.values()).index(loss) for loss in chosen]
    steps = [after - before for before, after in itertools.pairwise(ranks)]
    assert max(steps) - min(steps) <= 1
    assert [output.label for output in found.chosen[0].outputs][:2] == ["Bare base", "Full"]
    longest = max(len(output.text) for example in found.chosen for output in example.outputs)
    assert longest < 800
    assert "characters in all" in found.chosen[0].outputs[0].text


def test_without_the_runs_folders_the_reports_are_made_of_what_is_there(tmp_path: Path) -> None:
    case = sample(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "base")
    drawn = {path.stem for path in write_reports(case, tmp_path) if path.parent.name == "plots"}
    assert drawn == set(NAMES) - {"learning-curves"}
    assert "What they write" not in (tmp_path / "report.html").read_text(encoding="utf-8")
