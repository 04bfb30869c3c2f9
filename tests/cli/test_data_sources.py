"""Several data files on the command line and in YAML: weights, names, and what an error names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Spectune

from spectune.cli.settings import Settings
from spectune.data import Source
from spectune.errors import ConfigError

QUICK = ("--set", "max_steps=2", "--device", "cpu")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.jsonl (10 rows), b.jsonl (4) and test files of both, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, count in {"a": 10, "b": 4, "a-test": 3, "b-test": 2}.items():
        rows = [{"prompt": f"{name} {i}", "completion": f" is {i}"} for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def of_flags(*given: str) -> Any:
    return Settings.collect(None, None, {"data": list(given)}).rows("data")


def of_yaml(text: str) -> Any:
    Path("run.yaml").write_text(text)
    settings = Settings.collect(Path("run.yaml"), None, {})
    settings.methods([])
    return settings.rows("data")


def test_flags_name_files_with_weights(files: Path) -> None:
    assert of_flags("a.jsonl=0.5", "b.jsonl=2") == [Source("a.jsonl", 0.5), Source("b.jsonl", 2)]
    assert of_flags("a.jsonl") == "a.jsonl"
    assert of_flags("a.jsonl=2") == [Source("a.jsonl", 2)]


def test_a_file_with_an_equals_sign_in_its_name_has_no_weight_but_may_be_given_one(files: Path) -> None:
    Path("lr=2").write_text("text\n")
    Path("a=b.txt").write_text("text\n")
    assert of_flags("lr=2") == "lr=2"
    assert of_flags("a=b.txt") == "a=b.txt"
    assert of_flags("a=b.txt=3") == [Source("a=b.txt", 3)]
    Path("folder=1").mkdir()
    assert of_flags("folder=1") == "folder=1"


def test_names_of_the_hub_stay_as_they_are(files: Path) -> None:
    assert of_flags("owner/name:train") == "owner/name:train"
    assert of_flags("owner/name:train[:10%]") == "owner/name:train[:10%]"
    assert of_flags("owner/name=x") == "owner/name=x"
    assert of_flags("owner/name:train=2") == [Source("owner/name:train", 2)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "twice", ""])
def test_a_weight_that_is_none_is_refused(files: Path, weight: str) -> None:
    with pytest.raises(ConfigError, match=r"--data: data a: weight = .+; expected a number above 0"):
        of_flags(f"a.jsonl={weight}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: a.jsonl", "a.jsonl"),
        ("data: [a.jsonl]", "a.jsonl"),
        ("data: a.jsonl=2", [Source("a.jsonl", 2.0)]),
        ("data: [a.jsonl, b.jsonl=0.5]", [Source("a.jsonl"), Source("b.jsonl", 0.5)]),
        (
            "data: [a.jsonl, {path: b.jsonl, weight: 2, name: web}]",
            [Source("a.jsonl"), Source("b.jsonl", 2, "web")],
        ),
        ("data:\n- a.jsonl\n- path: b.jsonl\n  weight: 2\n", [Source("a.jsonl"), Source("b.jsonl", 2)]),
        ("data: {path: b.jsonl, name: web}", [Source("b.jsonl", 1.0, "web")]),
        ("data:\n  path: b.jsonl\n  weight: 2\n", [Source("b.jsonl", 2)]),
    ],
)
def test_yaml_has_files_or_entries(files: Path, text: str, expected: Any) -> None:
    assert of_yaml(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ndata: [{path: b.jsonl, wieght: 2}]", "run.yaml:2: data has an entry with unknown keys: 'wieght': did you "),
        ("data: {path: b.jsonl, columns: 2}", "'columns': known are name, path, weight"),
        ("data: [{weight: 2}]", "run.yaml:1: data has the entry {'weight': 2}; expected {path: FILE, weight: 2}"),
        ("data: [{path: b.jsonl, weight: '2'}]", "run.yaml:1: data b: weight = '2'; expected a number above 0"),
        ("data: [{path: b.jsonl, weight: true}]", "weight = True; expected a number above 0"),
        ("data: [{path: b.jsonl, weight: null}]", "weight = None; expected a number above 0"),
        ("data: [{path: b.jsonl, weight: 0}]", "weight = 0; expected a number above 0"),
        ("data: [{path: b.jsonl, weight: .nan}]", "weight = nan; expected a number above 0"),
        ("data: [{path: b.jsonl, name: 3}]", "run.yaml:1: a data source has the name 3; expected text"),
        ("data: [a.jsonl, 3]", "run.yaml:1: data is ['a.jsonl', 3]; expected a file, or a list of files"),
        ("data: [[a.jsonl]]", "expected a file, or a list of files"),
    ],
)
def test_an_entry_that_is_none_is_named(files: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_yaml(text)
    assert expected in str(caught.value)


def test_train_plan_and_dry_run_say_the_mixture_and_losses_are_by_file(
    spectune: Spectune, base: Path, files: Path
) -> None:
    data = ("--data", "a.jsonl=0.5", "--data", "b.jsonl=2")
    valid = ("--valid", "a-test.jsonl", "--valid", "b-test.jsonl")
    said = "10 rows of a (x 0.5), 4 of b (x 2): 13 examples an epoch"
    command = ("train", "--model", base, *data, *valid, *QUICK)
    dry = spectune(*command, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    assert said in dry.stderr
    assert json.loads(dry.stdout)["runs"][0]["train_sources"]["b"]["examples"] == 8
    result = spectune(*command, "--output-dir", "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert said in result.stderr
    answer = json.loads(result.stdout)
    assert list(answer["valid_loss_by_source"]) == ["a-test", "b-test"]
    assert yaml.safe_load(Path("out/config.yaml").read_text())["data"] == ["a.jsonl=0.5", "b.jsonl=2"]
    refused = spectune("train", "--resume", "--output-dir", "out", "--data", "a.jsonl=0.5", "--data", "b.jsonl")
    assert refused.exit_code == 2
    assert "weight of data b: 2 in the finished run, 1 now" in refused.stderr

    plan = spectune("plan", "--model", base, *data, "--set", "method.name=bitfit", "--device", "cpu", "--json")
    assert plan.exit_code == 0, plan.stderr
    assert json.loads(plan.stdout)["data"]["mixture"].endswith(" examples an epoch")
    assert " of b (x 2): " in plan.stderr

    judged = spectune("eval", "--run", "out", "--data", "a-test.jsonl", "--data", "b-test.jsonl", "--metric", "loss")
    assert judged.exit_code == 0, judged.stderr
    assert "loss by source" in judged.stdout
    judged = spectune(
        "eval", "--run", "out", "--data", "a-test.jsonl", "--data", "b-test.jsonl", "--metric", "loss", "--json"
    )
    found = json.loads(judged.stdout)
    assert found["tuned"]["loss_by_source"] == pytest.approx(answer["valid_loss_by_source"], rel=1e-5)
    assert list(found["base"]["loss_by_source"]) == ["a-test", "b-test"]
