"""`spectune plan` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectune.methods import METHODS

Spectune = Callable[..., Any]
NAMES = {str(method.model_fields["name"].default) for method in METHODS}


def test_with_no_flag_the_whole_spectrum_by_trained_weights(spectune: Spectune) -> None:
    result = spectune("plan", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if any(f" {name} " in line for name in NAMES)]
    assert len(rows) == len(METHODS)
    trained = [int(line.split("│")[2].replace(",", "")) for line in rows]
    assert trained == sorted(trained)
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "peak", "fits"):
        assert word in result.stdout


def test_one_method_for_a_device_that_is_not_here(spectune: Spectune, base: Path) -> None:
    result = spectune(
        "plan", "--model", base, "--method", "lora", "--memory", "24GiB", "--batch", "4", "--length", "100",
        "--set", "r=4", "--gradient-checkpointing", "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    [plan] = answer["methods"]
    assert answer["device"] == "cuda"
    assert answer["memory"] == 24 * 2**30
    assert plan["fits"] is True
    assert (plan["batch"], plan["length"], plan["dtype"], plan["gradient_checkpointing"]) == (4, 100, "bfloat16", True)
    assert plan["trainable_parameters"] == 2 * 4 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert plan["peak_reserved"] >= plan["peak_allocated"] > plan["weights"]
    assert plan["needed"] >= plan["peak_reserved"] + plan["context"]


def test_what_does_not_fit_is_exit_4_and_says_what_does(spectune: Spectune, base: Path) -> None:
    of_base = ("plan", "--model", base, "--device", "cpu", "--set", "per_device_eval_batch_size=1")
    asked = (*of_base, "--method", "bitfit")
    memory = json.loads(spectune(*asked, "--json").stdout)["methods"][0]["needed"] * 4 // 10
    result = spectune(*asked, "--memory", memory, "--json")
    assert result.exit_code == 4
    [plan] = json.loads(result.stdout)["methods"]
    assert plan["fits"] is False
    assert "largest term" in result.stderr
    assert f"per_device_train_batch_size={plan['largest_batch']}" in result.stderr
    assert 1 <= plan["largest_batch"] < 8
    assert 2 <= plan["largest_length"] < 160
    for flag, most in (("--batch", plan["largest_batch"]), ("--length", plan["largest_length"])):
        assert spectune(*asked, "--memory", memory, flag, most).exit_code == 0
    # the table as a whole fails only where nothing fits
    assert spectune(*of_base, "--methods", "bitfit,lora", "--memory", "200KiB").exit_code == 4


def test_data_say_rows_tokens_and_steps(spectune: Spectune, base: Path, rows: Path) -> None:
    result = spectune("plan", "--model", base, "--data", rows, "--methods", "lora,full", "--batch", "5", "--json",
                      "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["data"]["rows"], answer["data"]["held_out"]) == (11, 1)
    assert answer["data"]["steps_per_epoch"] == 3
    assert set(answer["data"]["flops_per_epoch"]) == {"full", "lora"}
    assert {plan["length"] for plan in answer["methods"]} == {answer["data"]["longest_row_tokens"]}


def test_calibration_times_real_steps(spectune: Spectune, base: Path, rows: Path) -> None:
    result = spectune("plan", "--model", base, "--data", rows, "--method", "bitfit", "--calibrate", "--json",
                      "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    [timed] = json.loads(result.stdout)["calibration"]
    assert timed["seconds_per_epoch"] > 0
    assert timed["timed_steps"] == 4
    assert "by 4 steps here on cpu" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--memory", "lots"], 2, "such as 24GiB"),
        (["--method", "lore"], 2, "did you mean 'lora'"),
        (["--set", "rank=4"], 2, "did you mean 'r'"),
        (["--length", "9000", "--method", "lora"], 2, "this base has 512 positions"),
        (
            ["--method", "prefix", "--set", "num_virtual_tokens=600"],
            2,
            "600 virtual tokens, and this base has 512",
        ),
        (["--method", "lora", "--methods", "bitfit"], 2, "--method and --methods: expected one"),
        (["--model", "no/such/base"], 3, "no/such/base"),
    ],
)
def test_mistakes(spectune: Spectune, arguments: list[str], code: int, says: str) -> None:
    result = spectune("plan", *arguments)
    assert result.exit_code == code
    assert says in result.stderr


def test_a_method_without_room_for_rows_is_left_out_of_the_spectrum(spectune: Spectune) -> None:
    result = spectune("plan", "--set", "prefix.num_virtual_tokens=600", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "prefix" not in {entry["method"] for entry in answer["methods"]}
    assert [entry["method"] for entry in answer["refused"]] == ["prefix"]
    assert {entry["length"] for entry in answer["methods"]} == {492}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_the_plain_command_is_quick() -> None:
    """Six seconds of the processor: what else the machine does does not count."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "spectune", "plan", "--method", "lora"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
