"""`spectune doctor`'s checks: what each says where something works, is not there, and is broken."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.compute.fp8 import FrozenFp8Linear
from spectune.compute.int8 import FrozenInt8Linear
from spectune.health import compiling, machine_load, numbers, processes
from spectune.health.attention_cases import FEW, MASKS, AttentionCase, Inputs, cases
from spectune.health.attention_check import NOT_FINITE, REFUSED, RIGHT, WRONG, Finding, check_case, judge
from spectune.health.checkup import Check, Checkup, checks
from spectune.health.disk import disk
from spectune.health.known_faults import FLOORS, KNOWN, KnownFault, versions
from spectune.health.outcome import FAILED, NOT_HERE, OK, Outcome

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [*FEW, AttentionCase("right", 64, dropout=0.1), AttentionCase("left", 1)], ids=str)
def test_the_kernels_of_this_machine_are_right_on_a_few_calls(case: AttentionCase) -> None:
    found = {finding.kernel: finding.status for finding in check_case(case, CPU)}
    assert set(found.values()) <= {RIGHT, REFUSED}
    assert found["math"] == RIGHT
    if case.mask == "packs":
        assert found["loop"] == RIGHT


def test_one_key_too_many_and_one_that_is_not_finite_are_seen() -> None:
    """Of a causal call of 64 tokens: the last query sees all, so one row of 64 is wrong where the first sees two."""
    inputs = Inputs(AttentionCase("causal", 64, rows=1), CPU)
    whole = [torch.randn(t.shape, dtype=torch.float64) for t in (inputs.grad, *inputs.tensors)]
    assert judge("mine", inputs, whole, whole).status == RIGHT
    off = [t.clone() for t in whole]
    off[2][:, :, :1] *= 1.3
    assert judge("mine", inputs, off, whole).status == WRONG
    off[3][0, 0, 0, 0] = torch.nan
    finding = judge("mine", inputs, off, whole)
    assert (finding.status, finding.why) == (NOT_FINITE, "value")


def test_the_grid_is_whole_and_begins_with_what_was_met() -> None:
    found = list(cases())
    assert (found[0].rows, found[0].length, found[0].mask) == (64, 192, "right")
    assert len(set(found)) == len(found) > 1296
    assert {case.mask for case in found[:200]} == set(MASKS)


def test_cudnn_is_asked_of_what_has_no_mask_and_no_dropout_alone() -> None:
    asked = {
        ("cudnn", AttentionCase("causal", 8)): True,
        ("cudnn, zero queries", AttentionCase("prefix", 8)): True,
        ("cudnn, mask", AttentionCase("prefix", 8)): False,
        ("cudnn", AttentionCase("right", 8)): False,
        ("cudnn", AttentionCase("causal", 64, dropout=0.1)): False,
        ("chosen", AttentionCase("left", 8)): True,
    }
    assert {key: Finding(key[1], key[0], RIGHT).asked for key in asked} == asked


def findings(kernel: str, status: str, mask: str = "causal") -> Any:
    return lambda case, device: [Finding(AttentionCase(mask, 8), kernel, status, {"out": 0.25}, "out")]


def test_attention() -> None:
    found = numbers.attention(few=FEW[:2])
    assert found.status == OK
    assert "finite and right" in found.says
    broken = numbers.attention(findings("documents", WRONG))
    assert (broken.status, broken.advice) == (FAILED, "Train with --set packing=false")
    assert numbers.attention(findings("cudnn", NOT_FINITE)).advice.startswith("Set TORCH_CUDNN_SDPA")
    masked = numbers.attention(findings("cudnn", NOT_FINITE, "right"))
    assert masked.status == OK
    assert "enable_cudnn_sdp(False)" in masked.says
    assert "eager" in numbers.attention(findings("flash", WRONG)).advice


class Broken(FrozenInt8Linear):
    def product(self, x: Tensor) -> Tensor:
        return super().product(x) * 1.1


class NoNumber(FrozenInt8Linear):
    def product(self, x: Tensor) -> Tensor:
        return super().product(x) * torch.nan


def test_products_in_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert numbers.fp8().status == NOT_HERE
    assert numbers.stored_products("fp8", [FrozenFp8Linear]).status == OK, "by float32 copies on a CPU"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    without = numbers.codes()
    assert without.status == NOT_HERE
    assert "bitsandbytes" in without.says
    for kind in (Broken, NoNumber):
        found = numbers.stored_products("int8", [kind])
        assert found.status == FAILED
        assert "base_precision=int8" in found.advice


def raising(message: str) -> Any:
    def compile(block: nn.Module) -> Any:
        raise RuntimeError(message)

    return compile


def test_compile() -> None:
    assert compiling.compiled_block(lambda block: block).status == OK
    off = compiling.compiled_block(lambda block: lambda x: block(x) * 1.01)
    assert off.status == FAILED
    assert "torch_compile=false" in off.advice
    assert compiling.compiled_block(raising("segmentation of the graph")).status == FAILED
    without = compiling.compiled_block(raising("InvalidCxxCompiler: No working C++ compiler found"))
    assert without.status == NOT_HERE
    assert "longer" in without.advice


def test_graphs() -> None:
    if not torch.cuda.is_available():
        assert compiling.recorded_graph().status == NOT_HERE


def started(code: str) -> Any:
    def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.between_processes(started("print(0.5)")).status == OK
    broken = processes.between_processes(started("raise SystemExit('no such interface')"))
    assert broken.status == FAILED
    assert "no such interface" in broken.says
    assert "GLOO_SOCKET_IFNAME" in broken.advice
    monkeypatch.setattr(processes, "SECONDS", -4.5)
    late = processes.between_processes(started("import time; time.sleep(60)"))
    assert late.status == FAILED
    assert "did not find each other" in late.says


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = disk("output-folder", str(tmp_path / "not" / "there"))
    assert found.status == OK
    assert list(tmp_path.iterdir()) == []
    full = disk("output-folder", str(tmp_path), least_free=2**62)
    assert full.status == FAILED
    assert "--output-dir" in full.advice

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.fsync", refuse)
    refused = disk("cache-folder", str(tmp_path))
    assert refused.status == FAILED
    assert "Read-only" in refused.says
    assert "HF_HOME" in refused.advice


def test_cores_and_others_that_compute() -> None:
    assert machine_load.cores(threads=4, usable=4).status == OK
    many = machine_load.cores(threads=16, usable=4)
    assert (many.status, "OMP_NUM_THREADS=4" in many.advice) == (FAILED, True)
    assert machine_load.cores(threads=1, usable=8).status == NOT_HERE
    assert machine_load.busy(lambda: 0.99, load=0.1, usable=2).status == OK
    assert machine_load.busy(lambda: 0.4, load=0.1, usable=2).status == NOT_HERE
    assert machine_load.is_overloaded(load=111.8, usable=2)
    assert not machine_load.is_overloaded(load=5, usable=2)
    assert machine_load.busy(lambda: 0.99, load=9, usable=2).status == NOT_HERE
    assert 0 < machine_load.share_of_a_core(0.01) <= 1.1
    assert machine_load.usable_cores() >= 1


def test_memory() -> None:
    assert machine_load.memory(2**34).status == OK
    assert machine_load.memory(2**20).status == FAILED
    assert machine_load.memory(None).status == NOT_HERE


def test_versions() -> None:
    fine = {"torch": "2.13.0", "transformers": "5.24.0"}
    assert versions(fine).says == "torch 2.13.0, transformers 5.24.0"
    old = versions({"torch": "2.10.1+cu128", "transformers": None})
    assert old.status == FAILED
    assert "torch 2.10.1+cu128 is older than 2.11" in old.says
    assert "transformers is not installed" in old.says
    assert "'torch>=2.11'" in old.advice
    floor = versions({"torch": "2.11.0", "transformers": "5.17.0", "nvidia-cudnn-cu12": "9.15"})
    assert floor.status == OK
    assert all(fault.what in floor.says for fault in KNOWN)
    assert KNOWN[1].what not in versions({"torch": "2.11.0+cpu", "transformers": "5.17.0"}).says
    fault = KnownFault("torch", None, (3,), "adds wrong", "nowhere", avoided=False)
    assert versions(fine, (fault,)).status == FAILED


def test_the_floors_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, floor in FLOORS.items():
        assert f'"{name}>={".".join(map(str, floor))}"' in text


def of_code(code: str) -> Any:
    return lambda check: [sys.executable, "-c", code]


def test_a_check_that_hangs_or_crashes_fails_alone() -> None:
    hanging, check = of_code("import time; time.sleep(600)"), Check("compile", seconds=1.1, advice="do this")
    hangs = Checkup(60, hanging, overloaded=lambda: False).outcome(check)
    assert (hangs.status, hangs.advice) == (FAILED, "do this")
    assert "did not end within 1 s" in hangs.says
    slowed = Checkup(60, hanging, overloaded=lambda: True).outcome(check)
    assert (slowed.status, slowed.advice) == (NOT_HERE, "Run it again once the machine is quiet")
    crashes = Checkup(60, of_code("import os; os.abort()")).outcome(Check("fp8"))
    assert "SIGABRT" in crashes.says
    assert crashes.status == FAILED
    raises = Checkup(60, of_code("raise ValueError('no kernel')")).outcome(Check("fp8"))
    assert "exit code 1: ValueError: no kernel" in raises.says
    late = Checkup(0.5).outcome(Check("fp8"))
    assert (late.status, late.says[:13]) == (NOT_HERE, "not looked at")


def test_a_process_that_stays_although_it_was_killed_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end was not waited for any more where a disk that had stopped kept it, and Python complained of it."""
    calls, left = [], threading.Event()

    class Kept(subprocess.Popen[str]):
        def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
            calls.append(timeout)
            if timeout is not None:
                raise subprocess.TimeoutExpired(self.args, timeout)
            found = super().communicate()
            left.set()
            return found

    monkeypatch.setattr(subprocess, "Popen", Kept)
    found = Checkup(60, of_code("import time; time.sleep(600)"), overloaded=lambda: False).outcome(Check("fp8"))
    assert found.status == FAILED
    assert left.wait(60)
    assert calls == [30.0, 5, None]


def test_what_ends_the_command_ends_the_checks() -> None:
    began = time.monotonic()
    checkup = Checkup(60, of_code("import time; time.sleep(60)"))

    def interrupted() -> None:
        with checkup.started(checks("a", "b")):
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 50


def test_an_outcome_is_a_line() -> None:
    line = Outcome("compile", FAILED, "it broke", "Do this", 1.25).line()
    assert line == "FAILED    compile         it broke. Do this (1.2 s)"
