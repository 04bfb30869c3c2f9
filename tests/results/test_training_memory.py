"""What has to fit where a run trains: what is held of a device where there is one, elsewhere tensors."""

from __future__ import annotations

from pathlib import Path

from spectune.results import ComparisonResult
from spectune.results.arm_result import arm_results
from tests.comparing.invented import invent


def test_memory_is_what_is_held_of_a_device_and_its_prediction_is_of_the_same(tmp_path: Path) -> None:
    content = invent(tmp_path, {"lora": 1.0}, seeds=1)
    for run in content["runs"]:
        run["peak_memory_bytes"] = {"train_allocated": 40, "train_reserved": 57}
        run["predicted_memory_bytes"] = {"peak_allocated": 41, "peak_reserved": 56}
    [held] = arm_results(ComparisonResult.model_validate(content))
    assert (held.train_memory_bytes, held.predicted_memory_bytes) == (57, 56)
    for run in content["runs"]:
        del run["peak_memory_bytes"]["train_reserved"]
    [tensors] = arm_results(ComparisonResult.model_validate(content))
    assert (tensors.train_memory_bytes, tensors.predicted_memory_bytes) == (40, 41)
