"""Tables and figure, from an invented comparison whose numbers are worked out again here."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.reporting import units
from tests.reporting.from_content import (
    arm_results,
    comparison_csv,
    comparison_figure,
    comparison_html,
    comparison_markdown,
    comparison_table,
    write_reports,
)


def invented(**changes: Any) -> dict[str, Any]:
    """One run; every number is made up."""
    run = {
        "name": "lora",
        "method": "lora",
        "label": "LoRA",
        "best_for": "trying | pipes",
        "seed": 0,
        "learning_rate": 0.002,
        "trainable_parameters": 20_000,
        "stored_parameters": 20_000,
        "total_parameters": 1_000_000,
        "stored_bytes": 80_500,
        "train_loss": 1.0,
        "valid_loss": 1.5,
        "base_valid_loss": 3.0,
        "valid_perplexity": 4.48,
        "forgetting_kl_nats_per_token": 0.25,
        "peak_memory_bytes": {"train_allocated": 50_000_000, "train_resident": 900_000_000},
        "train_tokens_per_second": 3000.0,
        "train_seconds": 20.0,
        "decode_tokens_per_second": 80.0,
        "decode_tokens_per_second_base": None,
        "decode_tokens_per_second_merged": 100.0,
        "swap_seconds": 0.012,
        "metrics": {},
    }
    return {**run, **changes}


def comparison(*runs: dict[str, Any], failed: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "base": {
            "name": "a-base",
            "total_parameters": 1_000_000,
            "valid_loss": 3.0,
            "decode_tokens_per_second": 100.0,
            "device": "cpu",
            "dtype": "float32",
        },
        "data": {"train_rows": 10, "valid_rows": 5, "retained_passages": 4, "retained_from": "x", "retained_tokens": 9},
        "settings": {},
        "scale": [
            {
                "model": "GPT-2 124M",
                "total_parameters": 124_439_808,
                "shares": {"lora": {"parameters": 2_359_296, "share": 2_359_296 / 124_439_808}},
            }
        ],
        "runs": list(runs),
        "failed": failed or [],
        "verdict": None,
    }


FULL = invented(
    name="full",
    method="full",
    label="Full",
    valid_loss=1.0,
    trainable_parameters=1_000_000,
    train_tokens_per_second=1500.0,
    decode_tokens_per_second=100.0,
)


def test_numbers_of_a_row() -> None:
    full, lora = arm_results(comparison(FULL, invented()))
    assert lora.trainable_share == 0.02
    assert lora.relative_performance == pytest.approx(100 * (3.0 - 1.5) / (3.0 - 1.0))
    assert full.relative_performance == 100
    assert lora.speed_to_full == 2.0
    assert lora.inference_overhead == pytest.approx(0.25)
    assert lora.inference_overhead_merged == 0.0
    assert lora.bytes_for_ten_tasks == 805_000
    assert lora.train_memory_bytes == 50_000_000


def test_relative_performance_is_undefined_where_full_does_not_improve() -> None:
    for case in (comparison(invented()), comparison({**FULL, "valid_loss": 3.2}, invented())):
        assert all(row.relative_performance is None for row in arm_results(case))
        text = comparison_markdown(case)
        assert "undefined here: full fine-tuning" in text
        comparison_figure(case)


def rendered(case: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(case))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 140, 240])
def test_the_terminal_table_says_everything_at_any_width(width: int) -> None:
    text = rendered(comparison(FULL, invented()), width)
    for part in ("LoRA", "2%", "1.500", "75.0", "80.5 kB", "805 kB", "12 ms", "1.9%"):
        assert part in text, part
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_a_failed_run_stays_in_every_table_with_its_reason() -> None:
    case = comparison(FULL, failed=[{"method": "lora", "label": "LoRA", "reason": "the loss is nan in step 3"}])
    for text in (rendered(case, 120), comparison_markdown(case), comparison_csv(case), comparison_html(case)):
        assert "LoRA" in text
        assert "the loss is nan in step 3" in text


def test_csv_has_the_unrounded_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison(FULL, invented(valid_loss=1.23456789))))))
    assert float(rows[1]["valid_loss"]) == 1.23456789
    assert rows[1]["failed"] == ""


def test_markdown_escapes_pipes_and_html_escapes_text() -> None:
    assert "trying \\| pipes" in comparison_markdown(comparison(FULL, invented()))
    assert "<b>" not in comparison_html(comparison(FULL, invented(best_for="<b>")))


def test_files(tmp_path: Path) -> None:
    case = comparison(FULL, invented(), invented(name="lora-2", decode_tokens_per_second_merged=None))
    paths = write_reports(case, tmp_path)
    written = {str(p.relative_to(tmp_path)) for p in paths}
    assert written >= {
        "comparison.csv",
        "runs.csv",
        "comparison.md",
        "report.html",
        "shares-and-performance.svg",
        "shares-and-performance.png",
    }
    first = {p: p.read_bytes() for p in paths}
    write_reports(case, tmp_path)
    assert {p: p.read_bytes() for p in paths} == first
    assert b"LoRA" in first[tmp_path / "shares-and-performance.svg"]
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == written


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.count(1_189_632), "1.19M"),
        (units.count(999), "999"),
        (units.count(8_030_261_248), "8.03B"),
        (units.size(12_300_000), "12.3 MB"),
        (units.percent(0.000821), "0.0821%"),
        (units.percent(1.0), "100%"),
        (units.percent(-0.5, sign=True), "-50%"),
        (units.seconds(0.0123), "12 ms"),
        (units.number(None), "-"),
        (units.number(float("nan")), "nan"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected


def test_numbers_that_are_not_finite_do_not_stop_the_figure() -> None:
    broken = invented(name="lora-2", valid_loss=float("nan"), valid_perplexity=float("inf"))
    for case in (comparison(FULL, invented(), broken), comparison(broken), comparison(invented(), broken)):
        comparison_figure(case)._repr_png_()


def test_times_that_were_taken_beside_other_work_are_marked_and_explained() -> None:
    busy = {"ran_share": 0.62, "load_average": 5.1, "cores": 2}
    quiet = {"ran_share": 0.98, "load_average": 1.9, "cores": 2}
    lora = invented(machine_load={"train": busy, "decode": quiet})
    text = comparison_markdown(comparison({**FULL, "machine_load": {"train": quiet, "decode": quiet}}, lora))
    [line] = [line for line in text.splitlines() if line.startswith("| LoRA") and "tok/s" in line]
    assert line.count("~") == 2  # speed and time of training
    assert "busy with other work in training of LoRA (at worst this process had 62%" in text
    assert "the load average was 5.1 on 2 cores)" in text
    assert "~" not in comparison_markdown(comparison(FULL, invented()))


def test_overhead_is_shown_with_its_noise() -> None:
    ranges = {"inference_overhead_range": (0.21, 0.29), "inference_overhead_merged_range": (-0.05, 0.03)}
    text = comparison_markdown(comparison(FULL, invented(**ranges)))
    # nothing is told apart that is less than what a merged model, which is the base, was off the base
    assert "| +25% ±5% / as the base |" in text
    [_, lora] = arm_results(comparison(FULL, invented(**ranges)))
    assert lora.inference_overhead_noise == pytest.approx(0.05)
    noisy = {**ranges, "inference_overhead_merged_range": (-0.3, 0.31)}
    assert "| within noise (±31%) / as the base |" in comparison_markdown(comparison(FULL, invented(**noisy)))
    # results of before this was measured
    assert "| +25% / as the base |" in comparison_markdown(comparison(FULL, invented()))
