"""Checkpoints under damage, kills, signals and full disks: a run goes on with what is whole, or says what is not."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from spectune.deltas import attached
from spectune.errors import BusyFolderError, ConfigError, DataError, InterruptedRun, WriteError
from spectune.files.metadata import sealed
from spectune.methods import LoRA
from spectune.training import TrainingConfig, checkpoint, train
from spectune.training import loop as loop_module
from spectune.training.identity import OtherRunError
from spectune.training.interrupt import held_back, stopping_signals
from spectune.training.restoring import newest_whole, read_checkpoint
from tests.support import make_model, make_rows, make_tokenizer
from tests.support.other_process import other_process_in

STEPS = 8
Weights = dict[str, torch.Tensor]


def run(folder: Path, **changes: Any) -> Weights:
    """Eight steps, with a checkpoint and a validation after every second one. Returns the weights they end with."""
    given: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-2,
                             "save_steps": 2, "eval_steps": 2, "optim": "adamw_8bit", **changes}  # fmt: skip
    model, rows = make_model(dropout=0.1), make_rows()
    config = TrainingConfig(output_dir=folder, memory_check="off", **given)
    train(model, make_tokenizer(), LoRA(r=2), rows, rows[:6], config, console=Console(quiet=True))
    return {name: t.clone() for name, t in attached(model)["default"].training_state_dict().items()}


def stops(patch: pytest.MonkeyPatch, step: int, how: Callable[[Any], None]) -> None:
    """Something happens behind a step."""
    finish = loop_module.Loop.finish

    def finished(self: Any) -> float:
        loss = finish(self)
        if self.run.progress.step == step:
            how(self)
        return loss

    patch.setattr(loop_module.Loop, "finish", finished)


def killed(_: Any) -> None:
    raise MemoryError("killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was killed after its seventh step, with checkpoints of the fourth and the sixth; and its state."""
    folder, seen = tmp_path_factory.mktemp("stopped") / "run", list[Any]()

    def seen_and_killed(loop: Any) -> None:
        seen.append(loop.run)
        killed(loop)

    with pytest.MonkeyPatch.context() as patch:
        stops(patch, 7, seen_and_killed)
        with pytest.raises(MemoryError):
            run(folder)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    return folder, seen[0]


@pytest.fixture
def folder(stopped: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped[0], tmp_path / "run", symlinks=True))


def identity_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "checkpoint-6" / "state.json").read_text())["identity"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def of_earlier_version(path: Path, **progress: Any) -> None:
    """Rewrite a checkpoint's record as the version before digests and seals wrote it."""
    state = json.loads((path / "state.json").read_text())
    kept = {"progress": {**state["progress"], **progress}, "identity": state["identity"]}
    (path / "state.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("flips", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_a_checkpoint_is_noticed(folder: Path, stopped: Any, flips: int) -> None:
    place, draw, identity = folder / "checkpoint-6", random.Random(0), identity_of(folder)
    for path in sorted(place.iterdir()):
        good = path.read_bytes()
        for at in [0, len(good) - 2, *(draw.randrange(len(good)) for _ in range(flips))]:
            bad = bytearray(good)
            bad[at] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            if path.suffix == ".json" and says(bad) == says(good):
                continue  # JSON has two ways to write some things
            with pytest.raises(DataError, match=re.escape(str(place))):
                read_checkpoint(place, 6, stopped[1], identity)
        path.write_bytes(good)
    assert read_checkpoint(place, 6, stopped[1], identity).progress.step == 6


def says(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def tensors_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def gone(path: Path) -> None:
    path.unlink()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILES: list[tuple[str, Callable[[Path], None], str]] = [
    ("best.safetensors", gone, "is missing"),
    ("delta.safetensors", pipe, "is a pipe"),
    ("optimizer.safetensors", lambda path: save_file({}, path), "has the state of no weight"),
    ("optimizer.safetensors", tensors_with(lambda t: t.update({"0.exp_avg": torch.zeros(3)})), "0.exp_avg is [3]"),
    ("optimizer.safetensors", tensors_with(lambda t: t.update({"0.step": torch.zeros(9)})), "0.step is [9]"),
    ("optimizer.safetensors", tensors_with(lambda t: t.update({"99.step": torch.zeros(())})), "parameter 99.step"),
    ("optimizer.safetensors", tensors_with(lambda t: t.update({"²": torch.zeros(())})), "parameter ²"),
    ("optimizer.safetensors", tensors_with(lambda t: t.pop("0.step")), "missing: 0.step"),
    ("random.safetensors", tensors_with(lambda t: t.update(cpu=torch.zeros(8))), "cpu is [8] torch.float32"),
    ("random.safetensors", tensors_with(lambda t: t.update(cpu=t["cpu"] * 0)), "no random state of cpu"),
    ("random.safetensors", tensors_with(lambda t: t.clear()), "cpu is missing"),
    ("best.safetensors", tensors_with(lambda t: t.popitem()), "missing: "),
    ("delta.safetensors", tensors_with(lambda t: t.update({k: v.half() for k, v in t.items()})), "torch.float16"),
    ("delta.safetensors", tensors_with(lambda t: next(iter(t.values())).fill_(torch.nan)), "not finite"),
]  # fmt: skip
PROGRESS: list[tuple[dict[str, Any], str]] = [
    ({"window": 99}, "is not step 99 of epoch 2"),
    ({"step": 5}, "the checkpoint is that of step 6"),
    ({"epoch": -1}, "progress.epoch"),
    ({"tokens": 1.5}, "progress.tokens"),
    ({"best_loss": "low"}, "progress.best_loss"),
    ({"best_step": 7}, "best_step is 7"),
    ({"best_loss": None}, "best_step is 6 with best_loss None"),
    ({"targets": 10**9}, "counts do not fit together"),
    ({"seconds_by_phase": []}, "progress.seconds_by_phase"),
    ({"colour": 1}, "progress.colour"),
]


def test_a_checkpoint_without_digests_is_held_to_names_shapes_and_ranges(folder: Path, stopped: Any) -> None:
    """As earlier versions wrote them. Nothing of the run is touched before all has been looked at."""
    place, identity, state = folder / "checkpoint-6", identity_of(folder), stopped[1]
    of_earlier_version(place)
    read = read_checkpoint(place, 6, state, identity)
    assert equal(dict(read.delta), load_file(place / "delta.safetensors"))
    held = {name: t.clone() for name, t in state.delta.training_state_dict().items()}
    generator = torch.get_rng_state()
    for name, damage, said in FILES:
        good = (place / name).read_bytes()
        damage(place / name)
        with pytest.raises(DataError) as caught:
            read_checkpoint(place, 6, state, identity)
        assert said in str(caught.value)
        assert name in str(caught.value)
        (place / name).unlink(missing_ok=True)
        (place / name).write_bytes(good)
    for changes, said in PROGRESS:
        shutil.copy(stopped[0] / "checkpoint-6" / "state.json", place / "state.json")
        of_earlier_version(place, **changes)
        with pytest.raises(DataError) as caught:
            read_checkpoint(place, 6, state, identity)
        assert said in str(caught.value)
    assert equal(held, state.delta.training_state_dict())
    assert torch.equal(generator, torch.get_rng_state())


def test_a_record_of_a_later_version_and_one_of_other_files_are_refused(folder: Path, stopped: Any) -> None:
    place, identity = folder / "checkpoint-6", identity_of(folder)
    state = json.loads((place / "state.json").read_text())
    for changes, said in (({"format_version": 9}, "install a newer one"), ({"files": {}}, "says what  are")):
        (place / "state.json").write_text(json.dumps(sealed({**state, **changes})))
        with pytest.raises(DataError, match=said):
            read_checkpoint(place, 6, stopped[1], identity)


def test_the_newest_whole_checkpoint_is_gone_on_from_and_what_is_damaged_is_named_once(
    folder: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The one of an earlier version, here; what was passed over is not there in the end, and neither is what a kill
    left; `best` is that of the checkpoint until a better one is found."""
    of_earlier_version(folder / "checkpoint-4")
    (folder / "checkpoint-6" / "best.safetensors").unlink()
    (folder / ".best.4711").symlink_to("best-6")
    (folder / ".checkpoint-8.ab12cd34").mkdir()
    (folder / "checkpoint-²").mkdir()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "epo')
    assert os.readlink(folder / "best") == "best-6"
    with pytest.MonkeyPatch.context() as patch:
        stops(patch, 5, killed)
        with pytest.raises(MemoryError):
            run(folder, resume=True)
    assert os.readlink(folder / "best") == "best-4"
    assert (folder / "best" / "adapter_model.safetensors").is_file()
    assert not (folder / "best-6").exists()
    [warning] = caplog.records
    assert "checkpoint-6" in warning.getMessage()
    assert "best.safetensors is missing" in warning.getMessage()
    assert f"goes on from {folder / 'checkpoint-4'}" in warning.getMessage()
    assert equal(run(folder, resume=True), whole[1])
    assert sorted(content(folder)) == sorted(content(whole[0]))
    assert [path.name for path in folder.glob(".*")] == []


def test_where_no_checkpoint_is_whole_all_are_named_and_nothing_is_changed(folder: Path) -> None:
    for number in (4, 6):
        (folder / f"checkpoint-{number}" / "optimizer.safetensors").write_bytes(b"")
    before = content(folder)
    with pytest.raises(DataError, match="no checkpoint that is whole, and nothing was changed") as caught:
        run(folder, resume=True)
    assert all(f"checkpoint-{number}: " in str(caught.value) for number in (4, 6))
    assert content(folder) == before


def test_another_identity_is_another_run_and_no_damage(folder: Path, stopped: Any) -> None:
    with pytest.raises(OtherRunError, match="max_steps: 8 in the checkpoint, 9 now"):
        newest_whole(folder, stopped[1], {**identity_of(folder), "max_steps": 9})
    for key, wrong in (("processes", "two"), ("base", {"parts": {"x": 1}}), ("template_date", "today")):
        state = json.loads((folder / "checkpoint-6" / "state.json").read_text())
        state["identity"][key] = wrong
        (folder / "checkpoint-6" / "state.json").write_text(json.dumps(sealed(state)))
        with pytest.raises(DataError, match="identity"):
            read_checkpoint(folder / "checkpoint-6", 6, stopped[1], identity_of(folder))


def test_a_resumed_run_logs_what_an_unbroken_one_does_line_by_line(folder: Path, whole: Any) -> None:
    run(folder, resume=True)
    own, other = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, whole[0])
    )
    timeless = [[{key: value for key, value in line.items() if key != "seconds"} for line in lines]
                for lines in (own, other)]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_a_full_disk_says_what_is_whole_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", checkpoint.write_tensors

    def full(path: Path, *given: Any, **how: Any) -> Any:
        if "checkpoint-4" in path.parent.name and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(
            WriteError, match=r"run could not be written: no space.*checkpoint-2 there is whole.*resume"
        ):
            run(folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(folder.glob(".*"))
    assert equal(run(folder, resume=True), whole[1])


# -- signals ----------------------------------------------------------------------------------------------------


def test_a_hangup_and_a_second_signal_leave_a_whole_checkpoint(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal goes; and while the checkpoint is being written, somebody is impatient."""
    folder, write = tmp_path / "run", checkpoint.write_tensors

    def impatient(path: Path, *given: Any, **how: Any) -> Any:
        if "checkpoint-3" in path.parent.name:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, *given, **how)

    with monkeypatch.context() as patch:
        stops(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGHUP))
        patch.setattr(checkpoint, "write_tensors", impatient)
        patch.setattr(signal, "raise_signal", lambda number: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert [path.name for path in folder.glob(".*")] == []
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert equal(run(folder, resume=True), whole[1])


def test_one_hangup_is_answered_as_ctrl_c_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops(monkeypatch, 1, lambda _: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(InterruptedRun, match=r"SIGHUP after step 1 of 8.*--resume"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.fixture(autouse=True)
def _hangups_arrive() -> Iterator[None]:
    """Under nohup, too, which has them ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def hangups_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_ignored")
def test_who_ignores_hangups_goes_on_ignoring_them() -> None:
    assert signal.SIGHUP not in stopping_signals()
    with loop_module.Interrupts() as interrupts, held_back():
        os.kill(os.getpid(), signal.SIGHUP)
    assert interrupts.requested is None


# -- one process in a folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_process_is_refused_by_name_and_takes_nothing_away(folder: Path, resume: bool) -> None:
    before = content(folder)
    with other_process_in(folder) as other, pytest.raises(BusyFolderError) as caught:
        run(folder, resume=resume)
    assert f"spectune train has it, process {other} on " in str(caught.value)
    assert caught.value.exit_code == 2
    assert content(folder) == before


def test_a_run_that_fails_before_it_starts_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(tmp_path / "some" / "run", max_length=10**6)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        run(tmp_path)
    assert content(tmp_path) == {"mine": b"x"}
