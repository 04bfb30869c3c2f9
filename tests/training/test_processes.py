"""Several processes train as one does with the same rows a step: losses, weights, checkpoints, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectune.errors import InterruptedRun
from spectune.methods import LoRA
from spectune.training import loop as loop_module
from tests.support.two_processes import CASES, interrupt_after, run, settings

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str | Path, processes: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=200, **options
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]], str]:
    """The folder of two processes' results, what each of them found by name, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    good = json.dumps({"prompt": "name: Ada", "completion": " Ada lives in Leeds."}) + "\n"
    (folder / "rows-0.jsonl").write_text(good * 20)
    (folder / "rows-1.jsonl").write_text(good * 20 + '{"prompt": 7}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Loop, "finish", interrupt_after(3))
        with pytest.raises(InterruptedRun):
            run(LoRA(), settings(4, output_dir=folder / "one"))
    ended = torchrun(ROOT / "tests" / "support" / "two_processes.py", folder)
    assert (folder / "rank-0.json").is_file(), ended.stderr
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return folder, {name: [one[name] for one in found] for name in found[0]}, ended.stderr


def alike(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-5) for name, tensor in state.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_with_the_same_rows_a_step(name: str, launched: Any, tmp_path: Path) -> None:
    folder, found, _ = launched
    method, changes = CASES[name]
    alone, state = run(method, settings(4, output_dir=tmp_path / "run", **changes))
    losses, own = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder / name, tmp_path / "run")
    )
    assert len(losses) == len(own)
    for line, expected in zip(losses, own, strict=True):
        for key in {"loss", "train_loss", "valid_loss", "grad_norm", "tokens"} & expected.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (line, key)
    assert alike(load_file(folder / f"{name}.safetensors"), state)
    first, second = found[name]
    assert first["processes"] == second["processes"] == 2
    assert first["train_tokens"] == second["train_tokens"] == alone.train_tokens
    assert first["peak_memory_bytes"] == second["peak_memory_bytes"]
    assert (first["best_step"], first["valid_loss"]) == (second["best_step"], second["valid_loss"])


def test_a_run_of_two_processes_goes_on_in_one_and_the_other_way_round(launched: Any) -> None:
    folder, _, _ = launched
    _, whole = run(LoRA(), settings(4))
    _, parts = run(LoRA(), settings(4, output_dir=folder / "two", resume=True))
    assert alike(parts, whole)
    assert alike(load_file(folder / "one.safetensors"), whole)


def test_a_run_that_goes_on_keeps_the_rows_of_its_steps(launched: Any) -> None:
    for kind, message in launched[1]["batch that changes"]:
        assert kind == "OtherRunError"
        assert "rows of a step: 8 (2 x 2 on 2 processes) in the checkpoint, 4 (1 x 2 on 2 processes) now" in message


def test_what_dropout_draws_follows_from_the_step_and_the_process(launched: Any) -> None:
    assert launched[1]["dropout goes on"] == [True, True]


def test_an_interruption_of_any_process_stops_all_after_the_same_step(launched: Any) -> None:
    for kind, message in launched[1]["interrupted"]:
        assert kind == "InterruptedRun"
        assert "after step 3 of 6" in message


def test_processes_with_other_rows_say_so_by_name(launched: Any) -> None:
    for kind, message in launched[1]["other rows"]:
        assert kind == "DataError"
        assert message.startswith("process 1 has another run than process 0")
        assert "data: other rows" in message


def test_where_a_run_does_not_fit_on_one_device_it_begins_on_none(launched: Any) -> None:
    first, second = launched[1]["does not fit"]
    assert first == ["PeerFailedError", "process 1 failed: too large"]
    assert second == ["DoesNotFitError", "too large"]


def test_one_process_says_what_is_wrong_and_all_end_with_its_exit_code(launched: Any) -> None:
    printed = launched[2]
    assert printed.count("error: process 1: ") == printed.count("error: ") == 1, printed
    assert "rows-1.jsonl:21" in printed
    assert printed.count("exitcode  : 3") == 2, printed
