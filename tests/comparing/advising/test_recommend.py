"""The recommendation: picks, limits, the Pareto set, and when it abstains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spectune.files.strict_json import strict_json
from spectune.results import Limits
from spectune.results.recommendation import AXES
from tests.comparing.invented import invent
from tests.comparing.invented import judged as verdict
from tests.comparing.invented import recommended as recommend

SIX = {"full": 1.0, "lora": 1.0, "adapter": 1.002, "prefix": 1.04, "bitfit": 1.06, "prompt": 1.12}


def judged(folder: Path, levels: dict[str, float], **settings: Any) -> dict[str, Any]:
    content = invent(folder, levels, **settings)
    return {**content, "verdict": verdict(content, folder)}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return judged(tmp_path_factory.mktemp("six"), SIX)


def test_the_cheapest_of_the_best(six: dict[str, Any]) -> None:
    found = recommend(six)
    json.loads(strict_json(found))
    assert found["pick"] == "lora"  # full takes more memory, the adapter more time a token
    assert found["abstains"] is None
    assert found["axes"] == list(AXES)
    assert found["limits"] == {}
    known = {run["rows_file"] for run in six["runs"]}
    assert all(reason["runs"] and set(reason["runs"]) <= known for reason in found["reasons"])
    text = " ".join(reason["text"] for reason in found["reasons"])
    assert "no difference between them was found" in text
    assert "less time a decoded token than the adapter, less training memory than full fine-tuning" in text
    assert (
        "LoRA takes 6.1 GB of memory at its peak, 8 MB stored for one task, no more time a decoded token than the bare "
        "base, within noise (merged)" in text
    )


def test_tenants_make_storage_count_and_forbid_merging(six: dict[str, Any]) -> None:
    found = recommend(six, Limits(tenants=10))
    assert found["pick"] == "adapter"
    assert found["limits"] == {"tenants": 10}
    assert "40 MB stored for 10 tasks, +20% time a decoded token (unmerged)" in found["reasons"][-1]["text"]
    slow = recommend(six, Limits(tenants=2, max_latency_overhead=0.1))
    assert {"lora", "adapter"} <= {broken["name"] for broken in slow["excluded"]}
    assert any("LoRA takes 30% more time a token (unmerged); the limit is 10%." in x["text"] for x in slow["excluded"])
    alone = recommend(six, Limits(max_latency_overhead=0.1))
    assert {broken["name"] for broken in alone["excluded"]} == {"adapter"}  # merged, LoRA and BitFit cost nothing


def test_limits_are_kept(six: dict[str, Any]) -> None:
    found = recommend(six, Limits(max_memory_bytes=5_650_000_000, min_quality=98.5))
    assert found["pick"] == "prefix"
    assert {(x["name"], x["limit"]) for x in found["excluded"]} == {
        ("full", "max_memory_bytes"),
        ("lora", "max_memory_bytes"),
        ("adapter", "max_memory_bytes"),
        ("bitfit", "min_quality"),
        ("prompt", "min_quality"),
    }
    assert recommend(six, Limits(max_stored_bytes=5_000_000))["pick"] == "adapter"
    assert recommend(six, Limits(max_stored_bytes=5_000_000, tenants=2))["pick"] == "prefix"


def test_reserved_memory_counts_where_it_was_measured(six: dict[str, Any]) -> None:
    runs = [
        {**run, "peak_memory_bytes": {**run["peak_memory_bytes"], "valid_reserved": 17 * 10**9}} for run in six["runs"]
    ]
    found = recommend({**six, "runs": runs}, Limits(max_memory_bytes=16 * 10**9))
    assert found["pick"] is None
    assert {broken["name"] for broken in found["excluded"]} == set(SIX)


def test_no_arm_keeps_the_limits(six: dict[str, Any]) -> None:
    found = recommend(six, Limits(max_memory_bytes=10**9, min_quality=99))
    assert found["pick"] is None
    assert "the memory limit keeps out full fine-tuning, " in found["abstains"]
    assert "the quality limit keeps out" in found["abstains"]
    assert "The memory limit at 6,000,000 kB would let the adapter in." in found["abstains"]
    assert recommend(six, Limits(max_memory_bytes=6_000_000_000, min_quality=99))["pick"] == "adapter"
    both = recommend(six, Limits(max_memory_bytes=10**9, max_stored_bytes=1000))
    assert both["abstains"].endswith("No single limit, given up, would let one in.")


def test_what_was_not_measured_cannot_keep_a_limit(six: dict[str, Any]) -> None:
    runs = [{**run, "peak_memory_bytes": {}} for run in six["runs"]]
    found = recommend({**six, "runs": runs}, Limits(max_memory_bytes=10**12))
    assert found["pick"] is None
    assert all("was not measured" in broken["text"] for broken in found["excluded"])


def test_times_of_a_busy_machine_decide_nothing(six: dict[str, Any]) -> None:
    """One run of one method was timed beside other work: no time is an argument then, of no method."""
    busy = {"ran_share": 0.6, "load_average": 5.0, "cores": 2}
    loads = {"train": busy, "decode": busy}
    runs = [{**run, "machine_load": loads} if run["name"] == "prompt" else run for run in six["runs"]]
    found = recommend({**six, "runs": runs})
    text = " ".join(reason["text"] for reason in found["reasons"])
    assert "of training" not in text
    assert "train_seconds" not in found["axes"]
    assert "time a decoded token than" not in text.replace("no more time a decoded token than the bare base", "")
    slow = recommend({**six, "runs": runs}, Limits(max_latency_overhead=0.1))
    # merged, three are the base itself; of the others nothing is known
    assert {broken["name"] for broken in slow["excluded"]} == {"adapter", "prefix", "prompt"}
    assert all("was not measured on a quiet machine" in broken["text"] for broken in slow["excluded"])


def test_pareto_set(tmp_path: Path, six: dict[str, Any]) -> None:
    # each is best at something, but full: LoRA is as good and, merged, as quick
    assert set(recommend(six)["pareto"]) == set(SIX) - {"full"}
    content = judged(tmp_path, {"lora": 1.0, "lora-2": 1.2})
    assert recommend(content)["pareto"] == ["lora"]  # at the same cost
    tie = judged(tmp_path, {"lora": 1.0, "lora-2": 1.0005})
    assert recommend(tie)["pareto"] == ["lora", "lora-2"]  # raw numbers do not decide
    for run in tie["runs"]:
        run["train_seconds"] += 100 * (run["name"] == "lora")
    assert recommend(tie)["pareto"] == ["lora-2"]


def test_one_seed_and_a_difference_that_another_seed_could_turn(tmp_path: Path) -> None:
    content = judged(tmp_path, {"full": 1.0, "lora": 1.015}, seeds=1, rows=1000)
    assert content["verdict"]["pairs"][0]["differs"]
    found = recommend(content)
    assert found["pick"] is None
    assert "The evidence does not decide between full fine-tuning and LoRA" in found["abstains"]
    assert "more seeds" in found["abstains"]
    assert recommend(judged(tmp_path, {"full": 1.0, "lora": 1.015}, rows=1000))["pick"] == "full"
    clear = recommend(judged(tmp_path, {"full": 1.0, "lora": 1.2}, seeds=1, rows=1000))
    assert clear["pick"] == "full"
    assert "training noise is not covered" in clear["reasons"][-1]["text"]


def test_a_tie_that_leaves_too_much_open(tmp_path: Path) -> None:
    content = judged(tmp_path, {"full": 1.0, "lora": 1.03}, rows=40, noise=0.05)
    assert not content["verdict"]["pairs"][0]["differs"]
    cheap = content["verdict"]["arms"][0]["name"] == "lora"
    found = recommend(content)
    if cheap:  # nothing cheaper than the best: nothing is left to decide
        assert found["pick"] == "lora"
    else:
        assert found["pick"] is None
        assert "may be up to" in found["abstains"]


def test_no_method_is_better_than_the_base(tmp_path: Path) -> None:
    found = recommend(judged(tmp_path, {"lora": 4.5, "bitfit": 4.6}))
    assert found["pick"] is None
    assert "no method has a lower loss than the bare base (4.000 nats a token)" in found["abstains"]


def test_quality_without_full_is_against_the_best(tmp_path: Path) -> None:
    content = judged(tmp_path, {"lora": 1.0, "prompt": 2.0})
    found = recommend(content, Limits(min_quality=90))
    assert found["pick"] == "lora"
    assert "of 100 (100 is the best method); the limit is 90" in found["excluded"][0]["text"]


def test_without_intervals_it_abstains() -> None:
    runs = [{"name": n, "method": n, "label": n, "valid_loss": loss, "folder": f"runs/{n}"} for n, loss in
            (("full", 1.0), ("lora", 1.1))]  # fmt: skip
    content: dict[str, Any] = {"runs": runs, "failed": []}
    for found in (recommend(content), recommend({**content, "verdict": verdict(content, "nowhere")})):
        assert found["pick"] is None
        assert "no difference can be told from noise" in found["abstains"]
        assert found["pareto"] == ["full"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "no run ended"),
        ({"runs": None, "failed": None, "verdict": None}, "no run ended"),
        ({"runs": [], "failed": [{"method": "lora"}]}, "every run failed"),
    ],
)
def test_nothing_ran(content: dict[str, Any], said: str) -> None:
    found = recommend(content, Limits(tenants=3))
    assert (found["pick"], found["pareto"], found["reasons"]) == (None, [], [])
    assert said in found["abstains"]


def test_the_only_method(tmp_path: Path) -> None:
    found = recommend(judged(tmp_path, {"lora": 1.0}))
    assert found["pick"] == "lora"
    assert found["reasons"][0]["text"] == "LoRA is the only method that was run."


@pytest.mark.parametrize(
    "wrong", [{"tenants": 0}, {"max_memory_bytes": 0}, {"max_memory": 1}, {"min_quality": float("nan")}]
)
def test_wrong_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits(**wrong)


def test_a_merged_model_is_not_slower_than_its_base_where_the_rounds_disagree(six: dict[str, Any]) -> None:
    for run in six["runs"]:
        if run["name"] == "lora":
            run["decode"] = {"1": {"overhead": 0.3, "overhead_merged": 0.14, "overhead_merged_range": [0.002, 0.15]}}
    found = recommend(six)
    assert found["pick"] == "lora"
    assert "no more time a decoded token than the bare base, within noise (merged)" in found["reasons"][-1]["text"]
