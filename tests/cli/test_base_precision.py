"""`--base-precision` end to end: train, eval, generate, merge, resume, plan, compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Spectune = Callable[..., Any]
QUICK = ("--set", "max_steps=2", "--device", "cpu")


def test_a_run_over_fp8_is_recorded_judged_on_both_and_merged_on_the_plain_base(
    spectune: Spectune, base: Path, rows: Path
) -> None:
    common = ("--model", base, "--data", rows, "--valid", rows)
    trained = spectune("train", *common, "--base-precision", "fp8", "--json", *QUICK)
    assert trained.exit_code == 0, trained.stderr
    assert "frozen linears in fp8" in trained.stderr
    answer = json.loads(trained.stdout)
    [run] = Path("runs").iterdir()
    assert yaml.safe_load((run / "config.yaml").read_text())["base_precision"] == "fp8"
    assert json.loads((run / "identity.json").read_text())["base_precision"] == "fp8"
    judge = ("eval", "--data", rows, "--generate-rows", "0", "--json", "--device", "cpu")
    over = spectune(*judge, "--base-precision", "fp8")
    assert over.exit_code == 0, over.stderr
    assert json.loads(over.stdout)["tuned"]["loss_nats_per_token"] == pytest.approx(answer["valid_loss"], abs=1e-5)
    on_plain = spectune(*judge)
    assert "trained over the base in fp8, and loaded on the base as it is" in on_plain.stderr
    losses = [json.loads(found.stdout)["base"]["loss_nats_per_token"] for found in (over, on_plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    wrote = spectune("generate", "number 3", "--device", "cpu", "--base-precision", "int8")
    assert wrote.exit_code == 0, wrote.stderr
    merged = spectune("merge", "--device", "cpu")
    assert merged.exit_code == 0, merged.stderr


def test_going_on_over_another_precision_is_refused(spectune: Spectune, base: Path, rows: Path) -> None:
    folder = Path("runs/a")
    first = spectune(
        "train", "--model", base, "--data", rows, "--base-precision", "fp8", "--output-dir", folder, *QUICK
    )
    assert first.exit_code == 0, first.stderr
    again = spectune("train", "--resume", "--output-dir", folder, "--device", "cpu")
    assert again.exit_code == 0, again.stderr
    other = spectune("train", "--resume", "--output-dir", folder, "--base-precision", "int8", "--device", "cpu")
    assert other.exit_code == 2
    assert "base_precision: 'fp8' in the finished run, 'int8' now" in other.stderr


def test_it_is_a_key_of_config_and_set_too(spectune: Spectune, base: Path, rows: Path) -> None:
    Path("run.yaml").write_text("base_precision: fp4\n")
    common = ("train", "--model", base, "--data", rows, "--dry-run", *QUICK)
    wrong = spectune(*common, "--config", "run.yaml")
    assert wrong.exit_code == 2
    assert "base_precision 'fp4' is unknown; expected one of fp8, nf4, int8" in wrong.stderr
    right = spectune(*common, "--set", "base_precision=int8")
    assert right.exit_code == 0, right.stderr


def test_the_plan_shrinks(spectune: Spectune) -> None:
    asked = ("plan", "--methods", "full,lora", "--device", "cuda", "--json")
    refused = spectune(*asked, "--base-precision", "fp8")
    assert refused.exit_code == 2
    assert "Full trains the base's own weights" in refused.stderr
    sizes = []
    for more in ((), ("--base-precision", "fp8")):
        result = spectune("plan", "--method", "lora", "--device", "cuda", "--dtype", "bfloat16", "--json", *more)
        assert result.exit_code == 0, result.stderr
        [plan] = json.loads(result.stdout)["methods"]
        sizes.append(plan["weights"])
    assert sizes[1] < 0.8 * sizes[0]


def test_a_comparison_leaves_out_what_trains_the_base(spectune: Spectune, base: Path, rows: Path) -> None:
    common = ("compare", "--model", base, "--data", rows, "--base-precision", "fp8", *QUICK)
    named = spectune(*common, "--methods", "full,lora")
    assert named.exit_code == 2
    assert "full trains the base's own weights" in named.stderr
    dry = spectune(*common, "--quick", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    assert "base_precision fp8: full trains the base's own weights and is left out" in dry.stderr
    assert "full" not in [run["method"] for run in json.loads(dry.stdout)["runs"]]
