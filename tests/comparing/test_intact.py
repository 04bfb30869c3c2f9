"""A comparison's folder that was changed after it was written: a resumption refuses it by name, a report says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spectune.comparing import Comparison, measure
from spectune.comparing.intact import changed_since, check_intact
from spectune.comparing.short_runs import _save as save
from spectune.comparing.short_runs import _saved as saved
from spectune.errors import DataError
from spectune.reporting.words import changed_sentence
from spectune.results.comparison_file import Trial
from tests.comparing.small import run

ARMS = ["bitfit"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "c"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PASSAGES", 2), ("PASSAGE_TOKENS", 8), ("DECODE_TOKENS", 3), ("ROUNDS", 1)):
            patch.setattr(measure, name, value)
        patch.setattr("spectune.comparing.comparison.write_reports", lambda content, folder: [])
        run(folder, methods=ARMS)
    return folder


@pytest.fixture
def copy(compared: Path, tmp_path: Path) -> Path:
    # beside the first one, with which it shares its base's folder
    return Path(shutil.copytree(compared, compared.parent / tmp_path.name, symlinks=True))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_as_it_was_written_nothing_is_said(copy: Path) -> None:
    check_intact(copy, ARMS)
    assert changed_since(copy) == []
    assert Comparison.from_runs(copy).result.changed == []


def test_a_flipped_bit_anywhere_is_noticed(copy: Path) -> None:
    [folder] = (copy / "runs" / "bitfit").iterdir()
    made_again = {"rows.jsonl", "config.yaml"}  # the one is judged again, the other may be meant: both are said
    kept = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in made_again]
    kept += sorted((folder / "best").iterdir())
    for path in (copy / "conditions.json", copy / "base" / "rows.jsonl", copy / "base" / "passages.json", *kept):
        raw = path.read_bytes()
        flip(path)
        with pytest.raises(DataError) as caught:
            check_intact(copy, ARMS)
        assert path.name in str(caught.value)
        path.write_bytes(raw)
    for name in made_again:
        flip(folder / name)
        assert any(name in line for line in changed_since(copy))
        check_intact(copy, ARMS)


@pytest.mark.usefixtures("short_measurements")
def test_a_resumption_refuses_what_was_changed_and_makes_anew_what_is_gone(copy: Path) -> None:
    before = Comparison.load(copy)
    rows = copy / "base" / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"loss_sum": ', '"loss_sum": 1'))
    with pytest.raises(DataError, match=r"nothing is taken over.*Remove the files of base/") as caught:
        run(copy, methods=ARMS, resume=True)
    assert "base/rows.jsonl" in str(caught.value)
    rows.unlink()
    again = run(copy, methods=ARMS, resume=True)
    assert again.content["verdict"] == before.content["verdict"]
    assert again.runs == before.runs
    assert changed_since(copy) == []


@pytest.mark.usefixtures("short_measurements")
def test_judged_rows_that_were_changed_are_judged_again_with_a_word(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [rows] = copy.glob("runs/*/*/rows.jsonl")
    good = rows.read_text()
    lines = [json.loads(line) for line in good.splitlines()]
    lines[0]["prediction"] = "another"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(copy, methods=ARMS, resume=True)
    assert "its rows are judged again" in caplog.text
    assert rows.read_text() == good


def test_a_report_of_what_was_changed_goes_on_and_says_so(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    [result] = copy.glob("runs/*/*/result.json")
    content = json.loads(result.read_text())
    result.write_text(json.dumps(content | {"valid_loss": 0.001}))
    found = Comparison.from_runs(copy)
    assert found.runs[0]["valid_loss"] == 0.001
    place = str(result.relative_to(copy))
    assert place in caplog.text
    assert place in (changed_sentence(found.result) or "")
    found.save()
    for name in ("report.html", "comparison.md"):
        assert place.split("/")[-1] in (copy / name).read_text()
        assert "Changed or damaged after it was written" in (copy / name).read_text()
    assert Comparison.load(copy).result.changed == found.result.changed


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"max_length": "x"}},
        {"identity": {"template_date": "soon"}},
        {"fingerprint": {"parts": 3}},
        {"fingerprint": [1]},
        {"preset": {"seeds": list(range(50_000))}},
        {"arms": [{"name": "a"}] * 30_000},
        {"files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}},
        {"data": {"train_rows": -1}},
    ],
    ids=lambda change: str(change)[:30],
)
def test_conditions_that_are_none_are_one_sentence(copy: Path, change: dict[str, Any]) -> None:
    path = copy / "conditions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        Comparison.from_runs(copy)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../../secret.jsonl", "/etc/passwd", "runs/../../secret.jsonl"])
def test_rows_outside_of_the_folder_are_not_read(copy: Path, place: str) -> None:
    [result] = copy.glob("runs/*/*/result.json")
    content = json.loads(result.read_text())
    (copy.parent / "secret.jsonl").write_bytes((result.parent / "rows.jsonl").read_bytes())
    result.write_text(json.dumps({k: v for k, v in content.items() if k != "sha256"} | {"rows_file": place}))
    found = Comparison.from_runs(copy)
    assert any("is not in the comparison's folder" in line for line in found.content["verdict"]["sentences"])


def test_a_small_result_of_another_run_is_made_anew_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = (tmp_path / "search" / "lora" / name / "result.json" for name in ("0.001-4-a", "0.01-4-b"))
    trial = Trial(
        learning_rate=1e-3, steps=4, target_tokens=9, valid_loss=1.0, reason=None, extension=False, seconds_by_phase={}
    )
    save(trial, path, tmp_path)
    assert saved(path, Trial, tmp_path) is not None
    assert not caplog.records
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    assert saved(other, Trial, tmp_path) is None
    assert "is of another folder" in caplog.text
    flip(path)
    assert saved(path, Trial, tmp_path) is None
    assert "it is made anew" in caplog.text
