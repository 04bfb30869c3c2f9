"""Memory of training in a process of its own, on the embedded base."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spectune import embedded
from spectune.comparing import isolated
from spectune.comparing.isolated import STEPS, _measure, memory_job, train_memory_in_own_process
from spectune.data import Row, load_rows
from spectune.errors import ConfigError, DataError, OutOfMemoryError, SpectuneError
from spectune.methods import FullFineTuning, LoRA, PrefixTuning
from spectune.objectives import CAUSAL_LM
from spectune.storage import load
from spectune.training import TrainingConfig

TINY = {"name": "spectune-tiny", "device": "cpu", "dtype": "float32"}
SMALL = TrainingConfig(per_device_train_batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def weights() -> int:
    return sum(p.nbytes for p in load("spectune-tiny")[0].parameters())


@pytest.mark.slow
def test_full_fine_tuning_holds_weights_gradients_and_moments_at_its_longest_batch(
    weights: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(embedded.VALID.read_text().splitlines(keepends=True)[:16]))
    rows = load_rows(path)
    peaks = train_memory_in_own_process(memory_job(TINY, FullFineTuning(), SMALL, rows))
    assert 4 * weights < peaks["train_allocated"] < 6 * weights
    assert 3 * weights < peaks["valid_allocated"] < peaks["train_allocated"]
    assert any(key.startswith("train_resident") for key in peaks)
    # only tensors are counted, so another process gives the same number; a path gives what rows give
    here = _measure(memory_job(TINY, FullFineTuning(), SMALL, path))
    assert here["train_allocated"] == peaks["train_allocated"]
    lora = _measure(memory_job(TINY, LoRA(), SMALL, path))
    assert lora["train_allocated"] < peaks["train_allocated"] - weights


def test_the_childs_error_is_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's program, in this process: that it runs in one of its own is tested above."""

    def child(*_: Any, input: str, **__: Any) -> Any:
        said = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(input))
            patch.setattr(sys, "stdout", said)
            isolated._main()
        return subprocess.CompletedProcess([], 0, said.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", child)
    method = LoRA(target_modules=["nothing"])
    job = memory_job(TINY, method, SMALL, load_rows(embedded.VALID)[:4])
    with pytest.raises(ConfigError, match=r"memory of LoRA in a process of its own: .*nothing"):
        train_memory_in_own_process(job)


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "kind", "expected"),
    [
        (-9, "", "", OutOfMemoryError, "the system killed it"),
        (1, "", "Traceback\nImportError: no torch\n", SpectuneError, "exit code 1: ImportError: no torch"),
        (0, '{"error": "DataError", "message": "bad"}', "", DataError, "own: bad"),
        (0, '{"error": "ConfigError", "message": "bad"}', "", ConfigError, "own: bad"),
        (0, '{"error": "annotations", "message": "bad"}', "", SpectuneError, "own: bad"),
    ],
)
def test_every_end_of_the_child_is_told(
    monkeypatch: pytest.MonkeyPatch, code: int, stdout: str, stderr: str, kind: type[SpectuneError], expected: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code, stdout, stderr))
    with pytest.raises(kind, match=expected) as caught:
        train_memory_in_own_process(memory_job(TINY, LoRA(), SMALL, embedded.TRAIN))
    assert type(caught.value) is kind


def test_every_step_is_on_the_longest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's work, here: both steps see the batch that holds the longest row."""

    shapes: list[torch.Size] = []
    real = CAUSAL_LM.loss_sum

    def seen(model: Any, batch: Any, **settings: Any) -> Any:
        shapes.append(batch["input_ids"].shape)
        return real(model, batch, **settings)

    monkeypatch.setattr(CAUSAL_LM, "loss_sum", seen)
    rows = [Row(f"r:{n}", prompt="a " * n, completion="b") for n in range(9)]
    padded = SMALL.model_copy(update={"packing": False})
    peaks = _measure(memory_job(TINY, PrefixTuning(num_virtual_tokens=2), padded, rows))
    assert len(shapes) == STEPS
    assert len(set(shapes)) == 1
    assert shapes[0][0] == 4
    assert shapes[0][1] == max(len(load("spectune-tiny")[1]("a " * 8)["input_ids"]), 8) + 2
    assert peaks["train_allocated"] > 0
