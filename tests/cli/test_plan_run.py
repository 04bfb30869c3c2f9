"""`spectune plan` on runs that compile their blocks and record them: what is asked for, and what "auto" comes to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Spectune = Callable[..., Any]
ON_CUDA = ("plan", "--method", "lora", "--memory", "24GiB", "--length", "128")
#: two layers, so that a run of some thousand steps does not pay a compiler's time back, and one of a million does
MANY = 1_000_000


def answer(spectune: Spectune, *arguments: object) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The answer, its one method, and what was said."""
    result = spectune(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    [planned] = found["methods"]
    return found, planned, result.stderr


def test_compiled_blocks_are_planned_where_they_are_asked_for(spectune: Spectune, base: Path) -> None:
    asked = (*ON_CUDA, "--model", base, "--set", "cuda_graphs=false")
    found = {wanted: answer(spectune, *asked, "--set", f"torch_compile={wanted}") for wanted in ("true", "false")}
    compiled, eager = found["true"][1], found["false"][1]
    assert (compiled["torch_compile"], eager["torch_compile"]) == (True, False)
    assert compiled["activations"] < eager["activations"]
    assert compiled["peak_allocated"] < eager["peak_allocated"]
    assert "torch_compile" not in found["true"][2] + found["false"][2]


def test_the_table_says_who_is_compiled(spectune: Spectune, base: Path) -> None:
    asked = (*ON_CUDA, "--model", base)
    assert "compiled" in spectune(*asked, "--set", "torch_compile=true").stdout
    assert "compiled" not in spectune(*asked).stdout


def test_without_a_number_of_steps_it_is_said_what_is_planned(spectune: Spectune, base: Path) -> None:
    found, planned, said = answer(spectune, *ON_CUDA, "--model", base)
    assert planned["torch_compile"] is False
    assert found["steps"] is None
    assert "torch_compile=auto: blocks are planned without the compiler" in said
    assert "max_steps=N" in said


@pytest.mark.parametrize(("steps", "compiled"), [(50, False), (MANY, True)])
def test_auto_follows_the_run_s_steps(spectune: Spectune, base: Path, rows: Path, steps: int, compiled: bool) -> None:
    found, planned, said = answer(
        spectune, *ON_CUDA[:-2], "--model", base, "--data", rows, "--set", f"max_steps={steps}"
    )
    assert planned["torch_compile"] is compiled
    assert found["steps"] == steps
    assert f"torch_compile=auto: {str(compiled).lower()}, for a run of {steps:,} steps" in said


def test_steps_follow_from_rows_and_epochs(spectune: Spectune, base: Path, rows: Path) -> None:
    asked = ("--model", base, "--data", rows, "--batch", "5", "--set", "num_train_epochs=4")
    found, planned, _ = answer(spectune, *ON_CUDA[:-2], *asked)
    assert found["steps"] == 4 * found["data"]["steps_per_epoch"] == 12
    assert planned["torch_compile"] is False


def test_on_a_cpu_the_first_steps_are_planned(spectune: Spectune, base: Path) -> None:
    asked = ("plan", "--method", "lora", "--device", "cpu", "--model", base, "--length", "64")
    _, eager, _ = answer(spectune, *asked, "--set", "torch_compile=false")
    _, planned, said = answer(spectune, *asked, "--set", "torch_compile=true")
    assert planned["torch_compile"] is True
    assert planned["peak_allocated"] == eager["peak_allocated"]
    assert "on a CPU the first steps" in said
    # what the compiler recomputes later is recomputed in those steps too
    mode = ("--set", "gradient_checkpointing=selective")
    selective, lean = (
        answer(spectune, *asked, "--set", f"torch_compile={compiled}", *mode)[1] for compiled in ("true", "false")
    )
    assert selective["peak_allocated"] == lean["peak_allocated"] < eager["peak_allocated"]


def test_recorded_blocks_keep_memory_and_it_is_said(spectune: Spectune, base: Path) -> None:
    asked = (*ON_CUDA, "--model", base)
    _, graphs, said = answer(spectune, *asked)
    _, plain, quiet = answer(spectune, *asked, "--set", "cuda_graphs=false")
    assert (graphs["cuda_graphs"], plain["cuda_graphs"]) == (True, False)
    assert graphs["recordings"] > plain["recordings"] == 0
    assert graphs["peak_allocated"] > plain["peak_allocated"]
    assert graphs["peak_reserved"] >= plain["peak_reserved"]
    assert "cuda_graphs=auto: blocks are recorded for lora" in said
    assert "cuda_graphs" not in quiet
    _, lean, _ = answer(spectune, *asked, "--gradient-checkpointing")
    assert (lean["cuda_graphs"], lean["recordings"]) == (False, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu", "--set", "cuda_graphs=true"], "needs a CUDA device"),
        (["--device", "cuda", "--set", "cuda_graphs=true", "--set", "packing=true"], "packing=false"),
        (["--device", "cuda", "--set", "cuda_graphs=true", "--gradient-checkpointing"], "gradient_checkpointing=false"),
    ],
)
def test_what_cannot_be_recorded_is_refused_as_training_does(
    spectune: Spectune, arguments: list[str], says: str
) -> None:
    result = spectune("plan", "--method", "lora", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.fixture(scope="module")
def unlike_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which a few are long: packs leave out more than half of what padding adds."""
    path = tmp_path_factory.mktemp("unlike") / "rows.jsonl"
    lines = [{"prompt": "a" * (90 if i % 8 == 0 else 6), "completion": f" row {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("method", "packing"),
    [
        pytest.param(method, packing, marks=() if method == "lora" or packing == "auto" else pytest.mark.slow)
        for method in ("lora", "prompt", "prefix", "full")
        for packing in ("auto", "false")
    ],
)
def test_a_plan_of_rows_says_what_the_run_on_them_predicts(
    spectune: Spectune, base: Path, unlike_rows: Path, method: str, packing: str
) -> None:
    config = json.loads((base / "config.json").read_text())
    plain = Path(shutil.copytree(base, "plain"))  # dropout in attention makes masks of documents
    (plain / "config.json").write_text(json.dumps({**config, "attn_pdrop": 0.0}))
    for of_base in [base, plain] if packing == "auto" else [plain]:
        asked = ("--model", of_base, "--data", unlike_rows, "--method", method, "--device", "cpu", "--json")
        asked += ("--set", "max_steps=2", "--set", f"packing={packing}")
        planned = spectune("plan", *asked)
        assert planned.exit_code == 0, planned.stderr
        run = spectune("train", *asked)
        assert run.exit_code == 0, run.stderr
        [found], predicted = json.loads(planned.stdout)["methods"], json.loads(run.stdout)["predicted_memory_bytes"]
        assert predicted == {name: found[name] for name in predicted}
        assert ("rows are packed (" in run.stderr) == (packing == "auto")


def test_packs_are_planned_for_a_device_that_is_not_here(spectune: Spectune, base: Path, unlike_rows: Path) -> None:
    asked = ("plan", "--model", base, "--data", unlike_rows, "--method", "lora", "--device", "cuda", "--json")
    found = {}
    for packing in ("true", "false"):
        result = spectune(*asked, "--memory", "24GiB", "--set", "max_steps=2", "--set", f"packing={packing}")
        assert result.exit_code == 0, result.stderr
        [found[packing]] = json.loads(result.stdout)["methods"]
    assert found["true"]["peak_allocated"] < found["false"]["peak_allocated"]
