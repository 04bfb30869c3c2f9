"""Several processes train as one does with the same rows a step: losses, weights, checkpoints, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from spectune.cli.one_of_several import refuse_several
from spectune.errors import ConfigError, InterruptedRun
from spectune.methods import LoRA
from spectune.storage import resolve_device
from spectune.training import loop as loop_module
from spectune.training.distribution import World
from tests.faults.child import Case, Forks
from tests.faults.conftest import forks, shared_root
from tests.support.once import made_once
from tests.support.two_processes import CASES, FEW, interrupt_after, run, settings

__all__ = ["forks", "shared_root"]  # the fork server of tests/faults

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in CASES if name not in FEW]


def torchrun(*arguments: str | Path, folder: Path | None = None) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


Launched = tuple[Path, dict[str, list[Any]], str]


def found_in(folder: Path) -> Launched:
    """The folder of two processes' results, what each of them found by name, and what they printed."""
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return folder, {name: [one[name] for one in found] for name in found[0]}, (folder / "printed").read_text()


def fork(folder: Path, forks: Forks) -> None:
    """As torchrun would start them, without the seconds that two processes need to import everything."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    given = {"folder": str(folder)}
    children = [
        forks.start(
            Case(
                call="tests.support.two_processes:work", given=given, cwd=folder, limit_s=200, room=None,
                env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
        for rank in range(2)
    ]  # fmt: skip
    outcomes = [child.wait() for child in children]
    assert (folder / "rank-0.json").is_file(), "\n".join(map(str, outcomes))
    ends = "".join(f"\nexit code: {outcome.rc}" for outcome in outcomes)
    (folder / "printed").write_text("".join(outcome.stdout + outcome.stderr for outcome in outcomes) + ends)


def launch(folder: Path, *cases: str) -> None:
    printed, _ = torchrun(ROOT / "tests" / "support" / "two_processes.py", folder, *cases).communicate(timeout=200)
    assert (folder / "rank-0.json").is_file(), printed
    (folder / "printed").write_text(printed)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Launched:
    def make(folder: Path) -> None:
        good = json.dumps({"prompt": "name: Ada", "completion": " Ada lives in Leeds."}) + "\n"
        (folder / "rows-0.jsonl").write_text(good * 20)
        (folder / "rows-1.jsonl").write_text(good * 20 + '{"prompt": 7}\n')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop_module.Loop, "finish", interrupt_after(3))
            with pytest.raises(InterruptedRun):
                run(LoRA(), settings(4, output_dir=folder / "one"))
        fork(folder, forks)

    return found_in(made_once(tmp_path_factory, "two", make))


@pytest.fixture(scope="module")
def launched_others(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return found_in(made_once(tmp_path_factory, "two-others", lambda folder: launch(folder, *OTHERS)))


def alike(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-5) for name, tensor in state.items()
    )


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_two_processes_train_as_one_with_the_same_rows_a_step(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, found, _ = request.getfixturevalue("launched" if name in FEW else "launched_others")
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
    assert printed.count("exit code: 3") == 2, printed


def test_a_divergence_is_the_same_for_all_and_the_start_is_kept(launched: Any) -> None:
    folder, found, _ = launched
    for kind, message in found["diverged"]:
        assert kind == "DivergedError"
        assert "the loss is nan in step 3" in message
    assert (folder / "diverged" / "best-0").is_dir()


# -- how a command ends ---------------------------------------------------------------------------------------


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`spectune train` in two processes, some steps after its beginning."""
    endless = ["--set", "max_steps=100000", "--set", "eval_steps=100000", "--set", "save_steps=100000"]
    process = torchrun("-m", "spectune", "train", "--device", "cpu", "--output-dir", "run", *endless, folder=tmp_path)
    until = time.monotonic() + 100
    while not ((log := tmp_path / "run" / "metrics.jsonl").is_file() and log.stat().st_size) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_leaves_one_checkpoint_and_one_message(
    number: signal.Signals, long_run: subprocess.Popen[str], tmp_path: Path
) -> None:
    long_run.send_signal(number)
    printed, _ = long_run.communicate(timeout=60)
    assert printed.count(f"stopped: {number.name} after step") == printed.count("stopped:") == 1, printed
    assert "--output-dir run --resume" in printed
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_a_process_that_is_killed_is_missed_at_once(long_run: subprocess.Popen[str]) -> None:
    children = Path(f"/proc/{long_run.pid}/task/{long_run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed, _ = long_run.communicate(timeout=30)
    assert printed.count("error: ") == 1, printed
    assert "the connection to another process was lost" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "error: `spectune compare` runs in one process, and torchrun started 2"),
        (["train", "--bogus"], "error: No such option: --bogus"),
        (["train", "--set", "learning_rat=1"], "error: --set learning_rat=1: unknown key"),
    ],
)
def test_a_usage_error_is_said_once_and_is_exit_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    printed, _ = torchrun("-m", "spectune", *arguments, folder=tmp_path).communicate(timeout=100)
    assert printed.count(said) >= 1, printed
    assert printed.count("error: ") == 1, printed
    # torchrun ends the other one where it is still starting by then
    assert printed.count("exitcode  : 2") + printed.count("(SIGTERM)") >= 2, printed


def test_what_runs_in_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_several("train")
    with pytest.raises(ConfigError, match="`spectune compare` runs in one process, and torchrun started 2"):
        refuse_several("compare")
    with pytest.raises(ConfigError, match="runs in one process, and 2 were started"):
        World()


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device 'cuda:0' is one, and torchrun started 2 processes"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="started 2 processes on this machine, and it has 1 GPUs"):
        resolve_device("auto")
