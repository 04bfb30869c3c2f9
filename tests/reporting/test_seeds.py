"""Several runs an arm become one row, in every table, with its interval and what failed."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

import pytest
from rich.console import Console

from spectune.reporting.words import evidence
from spectune.results import ComparisonResult
from tests.reporting.from_content import (
    arm_results,
    comparison_csv,
    comparison_html,
    comparison_markdown,
    comparison_table,
    runs_csv,
)
from tests.reporting.sample import ARMS, HOSTILE, sample
from tests.reporting.test_reporting import FULL, comparison, invented


def rows_of(case: dict[str, Any]) -> dict[str, Any]:
    return {row.name: row for row in arm_results(case)}


def test_numbers_are_means_over_the_seeds_and_the_peak_is_the_largest() -> None:
    seeds = [
        invented(seed=seed, valid_loss=loss, peak_memory_bytes={"train_allocated": memory}, metrics={"bleu": bleu})
        for seed, loss, memory, bleu in ((0, 1.4, 50, 30.0), (1, 1.5, 70, 34.0), (2, 1.9, 60, 32.0))
    ]
    row = rows_of(comparison(FULL, *seeds))["lora"]
    assert row.seeds == 3
    assert row.valid_loss == row.loss == pytest.approx(1.6)
    assert row.relative_performance == pytest.approx(100 * (3.0 - 1.6) / 2)
    assert row.valid_perplexity == pytest.approx(2.718281828**1.6)
    assert row.train_memory_bytes == 70
    assert row.metrics == {"bleu": pytest.approx(32.0)}
    assert (row.loss_low, row.loss_high) == (None, None)


def test_intervals_come_from_the_verdict() -> None:
    case = sample()
    row = rows_of(case)["lora"]
    arm = next(arm for arm in case["verdict"]["arms"] if arm["name"] == "lora")
    assert (row.loss, row.loss_low, row.loss_high) == (arm["mean"], arm["low"], arm["high"])
    assert row.metric_intervals["rouge_l"][0] < row.metrics["rouge_l"] < row.metric_intervals["rouge_l"][1]
    assert "bleu" not in row.metric_intervals
    for text in (comparison_markdown(case), comparison_html(case), rendered(case, 200)):
        assert "0.272 ±0.016" in text


def test_overheads_are_means_of_each_runs_own_ratio() -> None:
    seeds = [
        invented(seed=0, decode_tokens_per_second=80.0, decode_tokens_per_second_base=100.0),
        invented(seed=1, decode_tokens_per_second=50.0, decode_tokens_per_second_base=60.0),
    ]
    assert rows_of(comparison(*seeds))["lora"].inference_overhead == pytest.approx((0.25 + 0.2) / 2)


def test_an_arm_with_one_failed_seed_keeps_its_row_and_an_arm_without_results_its_reason() -> None:
    rows = rows_of(sample())
    assert (rows["prompt"].seeds, rows["prompt"].seeds_failed, rows["prompt"].failed) == (2, 1, None)
    assert (rows["ia3"].seeds, rows["ia3"].seeds_failed) == (0, 3)
    assert rows["ia3"].failed == "out of memory: 12.3 GB wanted, 8 GB there"
    text = rendered(sample(), 200)
    assert "Prompt tuning (seed 2) failed: the loss is nan" in text
    assert "IA3 (seeds 0, 1 and 2) failed: out of memory" in text


def test_two_arms_of_one_label_are_told_apart() -> None:
    rows = rows_of(comparison(FULL, invented(), invented(name="lora-2")))
    assert (rows["lora"].label, rows["lora-2"].label) == ("LoRA", "LoRA (lora-2)")


def test_one_csv_has_a_line_an_arm_and_the_other_a_line_a_run() -> None:
    case = sample()
    arms = list(csv.DictReader(io.StringIO(comparison_csv(case))))
    assert [arm["name"] for arm in arms] == [*ARMS, "ia3"]
    runs = list(csv.DictReader(io.StringIO(runs_csv(case))))
    assert len(runs) == len(case["runs"]) + len(case["failed"])
    mine = [run for run in runs if run["name"] == "lora"]
    lora = next(arm for arm in arms if arm["name"] == "lora")
    for column in ("valid_loss", "forgetting_kl_nats_per_token", "metric_bleu"):
        assert float(lora[column]) == pytest.approx(statistics.mean(float(run[column]) for run in mine)), column
    assert [run["failed"] for run in runs if run["name"] == "ia3"] == ["out of memory: 12.3 GB wanted, 8 GB there"] * 3
    assert float(lora["metric_rouge_l_low"]) < float(lora["metric_rouge_l"])


def rendered(case: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table(case))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_says_the_verdict_first_and_breaks_no_number(width: int) -> None:
    text = rendered(sample(), width)
    lines = text.splitlines()
    assert lines[0].startswith("Full, LoRA and DoRA are best")
    assert max(map(len, lines)) <= width
    numbers = ("0.268 ±0.016", "0.656 ±0.020", "89.8 MB (+2%)", "(1.37x full)", "+33% ±4% / as the base")
    words = ("Forgetting", "Relative", "on the high edge", "14 (1 failed)", "We would pick LoRA.", "max memory 120 MB")
    for whole in (*numbers, *words):
        assert whole in text, whole


def test_markdown_says_the_verdict_first_and_opens_no_tag() -> None:
    text = comparison_markdown(sample())
    assert text.startswith("## Verdict\n\n**Full, LoRA and DoRA are best")
    assert text.index("## What we would pick, and why") < text.index("## Quality")
    assert "<" not in text
    assert "`runs/lora/seed-0-ab12cd30/rows.jsonl`" in text


def test_few_runs_are_named_and_many_by_their_folders() -> None:
    case = ComparisonResult.model_validate(sample())
    names = [str(run.rows_file) for run in case.runs]
    lora, full = ([name for name in names if name.startswith(f"runs/{arm}/")] for arm in ("lora", "full"))
    assert evidence(lora, case) == ", ".join(f"`{name}`" for name in lora)
    assert evidence([*lora, *full], case) == "6 runs in `runs/lora/`, `runs/full/`"
    assert evidence([*lora, *full[:2]], case) == "5 runs in `runs/lora/` (3), `runs/full/` (2)"
    assert evidence([*lora, "runs/full/seed-0-ab12cd30"], case) == "4 runs in `runs/lora/` (3), `runs/full/` (1)"
    assert evidence([*names, names[0]], case) == f"all {len(names)} runs in `runs/`"


def test_what_no_run_measured_has_no_column() -> None:
    """Runs judged side by side have no times; `not mergeable` would be said of a method that merges."""
    none = {"train_tokens_per_second": None, "train_seconds": None, "swap_seconds": None, "peak_memory_bytes": {},
            "decode_tokens_per_second": None, "decode_tokens_per_second_merged": None}  # fmt: skip
    case = comparison({**FULL, **none}, invented(**none))
    case["data"]["generated_rows"] = 0
    for text in (rendered(case, 200), comparison_markdown(case), comparison_html(case)):
        for gone in ("not mergeable", "Training speed", "Swap", "Memory", "± is half the interquartile", "0 rows"):
            assert gone not in text, gone
        assert "10 tasks" in text
    # measured of one method: the others have a mark
    assert "| Full | - |" in comparison_markdown(comparison({**FULL, **none}, invented()))


def test_a_label_cannot_speak_to_the_terminal_or_as_markup() -> None:
    label = "[red]L\x1b[31mo|RA[/red]\n" + HOSTILE
    case = comparison(FULL, invented(label=label))
    text = rendered(case, 300)
    assert "[red]L" in text
    assert "\x1b" not in text
    [line] = [line for line in comparison_markdown(case).splitlines() if "20k" in line]
    assert line.count(" | ") == line.replace("\\|", "").count("|") - 2


def test_notes_say_what_intervals_cover_and_what_was_spent() -> None:
    text = " ".join(rendered(sample(), 200).split())
    assert "95% interval, which covers the choice of rows and the noise of training (3 seeds)" in text
    assert "8 at 6.25%, then 4 at 12.5%, then 2 at 25% of the final steps" in text
    quick = sample()
    quick["verdict"] = {**quick["verdict"], "covers_training_noise": False}
    assert "not the noise of training" in rendered(quick, 200)


def test_where_the_evidence_does_not_decide_that_is_said() -> None:
    case = sample()
    case["recommendation"] = {
        "limits": {},
        "pareto": [],
        "axes": [],
        "pick": None,
        "abstains": "two are level.",
        "reasons": [],
        "excluded": [],
    }
    assert "No pick: two are level." in rendered(case, 200)
    assert "**No pick: two are level.**" in comparison_markdown(case)
    case["recommendation"] = {}
    assert "pick" not in rendered(case, 200)
    assert "pick" not in comparison_markdown(case)


def test_on_test_rows_the_loss_is_named_after_them() -> None:
    case = sample()
    case["data"]["judged_on"] = "test"
    text = rendered(case, 200)
    assert "Test loss" in text
    assert "120 test rows" in text
