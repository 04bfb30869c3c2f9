from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectune.compute import allocator_settings, memory
from spectune.compute.memory import AllocationTracker, PeakMemory, ResidentPeak

KIB = 1024
on_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


def test_a_tensor_counts_once_from_birth_to_death_whatever_views_it() -> None:
    with AllocationTracker() as tracker:
        x = torch.zeros(256)  # 1 KiB
        view = x.view(16, 16).t()[2:]
        assert tracker.live_bytes == KIB
        del x
        assert tracker.live_bytes == KIB
        y = view + 1
        assert tracker.live_bytes == KIB + y.numel() * 4
        del view
        assert tracker.live_bytes == y.numel() * 4
        del y
        assert tracker.live_bytes == 0
    assert tracker.peak_bytes == KIB + 14 * 16 * 4


def test_baseline_and_tensors_first_read_are_counted_once() -> None:
    weight, other = torch.zeros(256), torch.zeros(256)
    with AllocationTracker([weight, weight.view(2, 128)]) as tracker:
        assert tracker.live_bytes == KIB
        weight.add_(other)
        assert tracker.live_bytes == 2 * KIB
    assert tracker.peak_bytes == 2 * KIB


def test_other_devices_are_not_counted() -> None:
    with AllocationTracker() as tracker:
        torch.zeros(256, device="meta") + 1
    assert tracker.peak_bytes == 0


def test_what_backward_keeps_and_makes_is_counted() -> None:
    weight = nn.Parameter(torch.zeros(256))
    x = torch.ones(256)
    with AllocationTracker([weight, x]) as tracker:
        product = weight * x  # 1 KiB
        loss = product.pow(2).sum()  # keeps product; pow's result dies; loss is 4 bytes
        del product
        assert tracker.live_bytes == 3 * KIB + 4
        loss.backward()
        assert weight.grad is not None
        assert tracker.live_bytes == 3 * KIB + 4  # weight, x, its gradient; product is gone
    assert tracker.peak_bytes >= 4 * KIB


def step_peak(width: int) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    peaks = []
    for _ in range(2):
        with AllocationTracker(model.parameters()) as tracker:
            model(torch.ones(32, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(tracker.peak_bytes)
    assert peaks[1] >= peaks[0] - 64  # the second step has optimizer state from its start
    return peaks[1]


def _index(x: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(x.shape[0]) < 2]


def _gather(x: torch.Tensor) -> torch.Tensor:
    return x.gather(0, torch.zeros(2, x.shape[1], dtype=torch.int64))


def _select(x: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, torch.tensor([0, 3]))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
@pytest.mark.parametrize("take", [_index, _gather, _select])
def test_backward_of_indexing_takes_what_it_takes_where_nobody_looks(take: Callable[[torch.Tensor], Any]) -> None:
    """Under a dispatch mode autograd adds out of place, and would seem to take twice the memory."""
    x = torch.zeros(256, 256, requires_grad=True)
    size = 256 * KIB
    loss = take(x).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as plain:
        loss.backward()
    taken = itertools.accumulate(e.nbytes() for e in plain.profiler.kineto_results.events() if e.name() == "[memory]")
    expected, x.grad = x.grad, None
    loss = take(x).sum()
    with AllocationTracker([x]) as tracker:
        before = tracker.live_bytes
        loss.backward()
    assert size <= max(taken) < 1.1 * size  # of the operating system's own count
    assert size <= tracker.peak_bytes - before < 1.1 * size
    assert x.grad is not None
    assert expected is not None
    assert torch.equal(x.grad, expected)


def test_out_of_place_counts_twice_where_it_is_asked_for() -> None:
    x = torch.zeros(256)
    index = torch.zeros(1, dtype=torch.int64)
    with AllocationTracker([x, index]) as tracker:
        y = x.index_add(0, index, torch.ones(1))
    assert tracker.live_bytes == 2 * KIB + 8
    assert (x[0], y[0]) == (0, 1)


def test_a_training_step_gives_the_same_number_each_time() -> None:
    assert step_peak(64) == step_peak(64) < step_peak(128)


def test_the_number_is_close_to_the_sum_by_hand() -> None:
    parameters = 64 * 8 + 64 + 64 + 1
    # weights, gradients, two moments; AdamW's passing copies and activations come on top
    assert 4 * parameters * 4 < step_peak(64) < 4 * parameters * 4 + 6 * 32 * 64 * 4


@on_linux
def test_resident_peak_sees_memory_that_is_already_given_back_and_not_what_was_before() -> None:
    big = bytearray(256 * KIB * KIB)
    del big
    with PeakMemory("cpu", count_tensors=False) as peak:
        pass
    calm = peak.result["resident"]
    size = 64 * KIB * KIB
    # pages of its own: malloc may give what is free in the heap, and resident before
    with PeakMemory("cpu", count_tensors=False) as peak, mmap.mmap(-1, size) as pages:
        for place in range(0, size, mmap.PAGESIZE):
            pages[place] = 1
    assert 60 * KIB * KIB < peak.result["resident"] - calm < 100 * KIB * KIB
    with PeakMemory("cpu") as peak:
        block = torch.ones(16 * KIB * KIB)
        del block
    assert set(peak.result) == {"allocated", "resident"}
    assert peak.result["allocated"] == size


@on_linux
def test_resident_peak_is_sampled_where_the_mark_cannot_be_set_back(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").mkdir()
    (tmp_path / "statm").symlink_to("/proc/self/statm")
    (tmp_path / "status").symlink_to("/proc/self/status")
    with ResidentPeak(tmp_path) as peak:
        block = torch.ones(16 * KIB * KIB)
        assert peak._sampler is not None
    with ResidentPeak(tmp_path) as after:
        del block
    assert peak.result["resident"] > 64 * KIB * KIB
    assert after.result["resident"] > 64 * KIB * KIB


@on_linux
def test_a_write_that_does_nothing_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").write_text("")
    (tmp_path / "statm").write_text("100 10 0 0 0 0 0\n")
    (tmp_path / "status").write_text("VmHWM:\t  999999 kB\n")
    with ResidentPeak(tmp_path) as peak:
        assert peak._sampler is not None


@pytest.mark.skipif(memory.sys.platform == "win32", reason="Windows has no getrusage")
def test_without_proc_the_peak_since_the_start_has_its_own_name(tmp_path: Path) -> None:
    with ResidentPeak(tmp_path) as peak:
        pass
    assert list(peak.result) == ["resident_since_start"]
    assert peak.result["resident_since_start"] > KIB * KIB


def test_the_result_is_there_after_an_exception() -> None:
    def fails() -> None:
        with PeakMemory("cpu") as peak:
            results.append(peak)
            torch.zeros(256)
            raise RuntimeError("out of luck")

    results: list[PeakMemory] = []
    with pytest.raises(RuntimeError, match="out of luck"):
        fails()
    assert results[0].result["allocated"] == KIB


@pytest.mark.parametrize(
    ("settings", "expandable"),
    [
        ({}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, False),
    ],
)
def test_segments_are_expandable_unless_the_user_has_settings_of_his_own(
    settings: dict[str, str], expandable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in allocator_settings.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert memory.has_expandable_segments() is expandable


def test_commands_set_them_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator_settings.NAMES:
        monkeypatch.delenv(name, raising=False)
    allocator_settings.use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    allocator_settings.use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
