"""The benchmark of training steps: that it measures what it says, and that its page says what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.step_speed import meter as meter_module
from benchmarks.step_speed.data import fill, plain_name
from benchmarks.step_speed.driver import Plan, Watch
from benchmarks.step_speed.grid import PEFT_METHODS, REAL_SYSTEMS, SHAPES, SYSTEMS, TINY, Case, cases, text_length
from benchmarks.step_speed.limit import block_weights, flops_per_token, limit
from benchmarks.step_speed.meter import Meter
from benchmarks.step_speed.ours import VARIANTS
from benchmarks.step_speed.real_data import COMPLETIONS, PROMPTS, STEPS, rows_like_e2e, windows
from benchmarks.step_speed.real_data import SYSTEMS as REAL_VARIANTS
from benchmarks.step_speed.results import Results
from benchmarks.step_speed.table import page
from benchmarks.step_speed.targets import TARGETS, Floor, Ratio
from benchmarks.step_speed.worker import measure
from torch import nn

from spectune.methods import BY_NAME

CPU = torch.device("cpu")


# -- the limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "length", "frozen", "full"),
    [("GPT-2 124M", 1024, 1.43e6, 0.99e6), ("Llama 1B", 2048, 148e3, 101e3), ("Llama-3-8B", 2048, 25.0e3, 16.9e3)],
)
def test_limits_are_those_calculated_by_hand(shape: str, length: int, frozen: float, full: float) -> None:
    config = SHAPES[shape].config()
    assert limit(config, length, 0, trains_base=False, peak_tflops=790) == pytest.approx(frozen, rel=0.01)
    assert limit(config, length, 0, trains_base=True, peak_tflops=790) == pytest.approx(full, rel=0.01)


def test_a_deltas_weights_count_six_times_and_recomputation_never() -> None:
    config = TINY["tiny llama"].config()
    blocks, head = block_weights(config)
    assert head == 512 * 64
    assert blocks == 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    bare = flops_per_token(config, 32, 0, trains_base=False)
    assert bare == 4 * (blocks + head) + 6 * 32 * 64 * 6
    assert flops_per_token(config, 32, 1000, trains_base=False) == bare + 6000


# -- what is measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_ours_and_peft_train_alike(method: str) -> None:
    ours = measure(Case("tiny llama", method, "ours-eager"), "cpu", 5, 5)
    theirs = measure(Case("tiny llama", method, "peft"), "cpu", 5, 5)
    assert ours["trained_parameters"] == theirs["trained_parameters"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert len(ours["losses"]) == 10
    assert ours["tokens_per_second"] == pytest.approx(64 / ours["step_seconds"])


def test_full_fine_tuning_is_the_plain_loop() -> None:
    ours = measure(Case("tiny gpt2", "full", "ours-eager"), "cpu", 5, 5)
    plain = measure(Case("tiny gpt2", "full", "plain"), "cpu", 5, 5)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_the_trainer_and_checkpointing_change_no_loss() -> None:
    lines = [
        measure(Case("tiny llama", "lora", system), "cpu", 5, 5)
        for system in ("peft", "peft-trainer", "peft-trainer-checkpointed", "ours-eager-checkpointed")
    ]
    for line in lines[1:]:
        assert line["losses"] == pytest.approx(lines[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("method", ["adapter", "bitfit"])
def test_methods_that_peft_does_not_have_are_measured_too(method: str) -> None:
    line = measure(Case("tiny gpt2", method, "ours-eager"), "cpu", 5, 5)
    assert math.isfinite(line["losses"][-1])
    assert line["changed"]


def test_a_system_that_cannot_run_is_a_line_with_its_reason() -> None:
    line = measure(Case("tiny gpt2", "lora", "peft-liger-compiled"), "cpu", 5, 5)
    assert "iger" in line["refused"]
    assert "tokens_per_second" not in line


def test_a_system_that_fails_is_a_line_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.step_speed import peers

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(peers, "peft_model", fails)
    line = measure(Case("tiny gpt2", "lora", "peft"), "cpu", 5, 5)
    assert line["failed"] == "RuntimeError: CUDA error: device-side assert triggered"


def test_a_system_that_trains_nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    line = measure(Case("tiny llama", "lora", "peft"), "cpu", 5, 5)
    assert "no trained weight changed" in line["failed"]


def test_virtual_tokens_come_off_where_positions_run_out() -> None:
    assert text_length(SHAPES["GPT-2 124M"], "lora") == 1024
    assert text_length(SHAPES["GPT-2 124M"], "prompt") == 1004
    assert text_length(SHAPES["Llama-3-8B"], "prefix") == 2048


def test_a_compiled_system_without_a_graph_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.step_speed import peers

    monkeypatch.setattr(peers, "compile_blocks", lambda model: None)
    line = measure(Case("tiny llama", "lora", "peft-compiled"), "cpu", 5, 5)
    assert line["failed"] == "torch.compile made no graph"


# -- short rows


def test_lengths_are_those_of_the_distribution() -> None:
    rows = rows_like_e2e(4000, 512, all_targets=False)
    prompts = sorted(row.prompt_length for row in rows)
    completions = sorted(row.target_tokens for row in rows)
    assert [prompts[len(rows) * n // 10] for n in range(1, 10)] == pytest.approx(PROMPTS[1:-1], abs=1)
    assert [completions[len(rows) * n // 10] for n in range(1, 10)] == pytest.approx(COMPLETIONS[1:-1], abs=1)
    assert all(row.prompt_length + row.target_tokens == len(row.input_ids) for row in rows)
    assert all(row.prompt_length == 0 for row in rows_like_e2e(10, 512, all_targets=True))


def test_prompts_are_cut_where_the_base_has_no_room_and_completions_are_not() -> None:
    whole = rows_like_e2e(4000, 512, all_targets=False)
    rows = rows_like_e2e(4000, 512, all_targets=False, longest=108)
    assert max(len(row.input_ids) for row in whole) > 108 == max(len(row.input_ids) for row in rows)
    assert [row.target_tokens for row in rows] == [row.target_tokens for row in whole]
    line = measure(Case("tiny gpt2", "prompt", "real-ours-packed"), "cpu", 5, 5, rows=8)
    assert line["tokens_per_second"] > 0


def test_ours_and_peft_train_alike_on_padded_rows_and_only_rows_are_counted() -> None:
    ours = measure(Case("tiny llama", "lora", "real-ours-padded"), "cpu", 5, 5, rows=8)
    theirs = measure(Case("tiny llama", "lora", "real-peft"), "cpu", 5, 5, rows=8)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    rows = rows_like_e2e(STEPS * 8, 512, all_targets=False)
    timed = [rows[i] for batch in windows(rows, 8)[5:10] for i in batch]
    tokens = sum(len(row.input_ids) for row in timed)
    assert ours["tokens_per_second"] == pytest.approx(tokens / (5 * ours["step_seconds"]))
    share = ours["targets_per_second"] / ours["tokens_per_second"]
    assert share == pytest.approx(sum(row.target_tokens for row in timed) / tokens)
    assert 0.05 < ours["padding_share"] < 0.5


# -- first weights --------------------------------------------------------------------------------------------


def test_no_matrix_of_zeros_and_the_same_weights_under_both_names() -> None:
    ours = nn.ParameterDict({"a": nn.Parameter(torch.rand(4, 8)), "b": nn.Parameter(torch.zeros(8, 4))})
    theirs = nn.ParameterDict({"a": nn.Parameter(torch.rand(4, 8)), "b": nn.Parameter(torch.zeros(8, 4))})
    fill([("model.q.lora_A", ours["a"]), ("model.q.lora_B", ours["b"])])
    names = [f"base_model.model.model.q.lora_{kind}.default.weight" for kind in "AB"]
    fill(zip(names, (theirs["a"], theirs["b"]), strict=True))
    assert torch.equal(ours["a"], theirs["a"])
    assert torch.equal(ours["b"], theirs["b"])
    assert ours["b"].count_nonzero() == 32
    assert plain_name("model.q.lora.lora_B") == "model.q.lora_B"


# -- the clock ------------------------------------------------------------------------------------------------


def test_the_clock_starts_when_nothing_was_compiled_for_five_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [0]
    monkeypatch.setattr(meter_module, "compilations", lambda: made[0])
    clock = Meter(CPU, tokens=10, warmup=6, steps=3)
    clock.begin()
    steps, done = 0, False
    while not done:
        steps += 1
        made[0] += steps in (1, 2, 7)  # the last graph comes in step 7
        done = clock.step(float(steps))
    assert clock.found["warmup_steps"] == 12
    assert steps == 15
    assert clock.found["settled"]
    assert clock.found["recompiled_while_timed"] == 0
    assert clock.found["losses"] == [float(n) for n in range(1, 16)]


def test_a_system_that_never_stops_compiling_is_timed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(range(1000))
    monkeypatch.setattr(meter_module, "compilations", lambda: next(made))
    clock = Meter(CPU, tokens=10, warmup=5, steps=2, most=8)
    clock.begin()
    while not clock.step(0.0):
        pass
    assert clock.found["warmup_steps"] == 8
    assert not clock.found["settled"]


# -- order, budget --------------------------------------------------------------------------------------------


def test_the_most_important_cases_come_first() -> None:
    found = cases(SHAPES, "cuda", names=[], systems=[], methods=[])
    assert [(c.shape, c.method, c.system) for c in found[:4]] == [
        ("Llama-3-8B", "lora", name) for name in ("ours-compiled", "ours-graphs", "unsloth", "peft-liger-compiled")
    ]
    assert {c.method for c in found if c.system.startswith("ours")} == set(BY_NAME)
    assert not any(c.shape.startswith("spectune-tiny") for c in found)
    assert len(set(found)) == len(found)
    # every method's fast ways at every shape come before what is slower by design
    slow = [number for number, c in enumerate(found) if c.method != "lora" and "checkpointed" in c.system]
    fast = [number for number, c in enumerate(found) if c.system in ("ours-compiled", "peft-compiled", "ours-fp8")]
    assert max(fast) < min(slow)


def test_every_system_of_ours_has_its_settings() -> None:
    assert set(VARIANTS) == {name for name in SYSTEMS if name.startswith("ours")}
    assert set(REAL_VARIANTS) == {name for name in REAL_SYSTEMS if "ours" in name}


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(SystemExit, match="unsloht"):
        cases(SHAPES, "cuda", names=[], systems=["unsloht"], methods=[])


def a_plan(out: Path, **fields: Any) -> Plan:
    given = {"device": "cpu", "repeats": 2, "warmup": 5, "steps": 5, "budget": None, "timeout": 100.0,
             "peak_tflops": None, "allocator": "x"}  # fmt: skip
    return Plan(out=out, **{**given, **fields})


def a_line(speed: float = 100.0, **fields: Any) -> dict[str, Any]:
    given = {
        "shape": "tiny gpt2", "method": "lora", "system": "peft", "repeat": 0, "rows": 2, "length": 32,
        "dtype": "float32", "device": "cpu", "threads": 1, "packages": {"torch": "2.0"}, "trained_parameters": 10,
        "tokens_per_second": speed, "compile_seconds": 1.0, "settled": True, "losses": [6.0, 5.0],
        "flops_per_token": 1e9, "peak_tflops": None, "allocator": "x", "peak_resident": 2**30,
    }  # fmt: skip
    return {**given, **fields}


def test_repeats_are_interleaved_and_failures_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(self: Plan, case: Case) -> dict[str, Any]:
        line = a_line(method=case.method, system=case.system)
        del line["repeat"]
        return {"failed": "no"} if case.system == "plain" else line

    monkeypatch.setattr(Plan, "_process", process)
    a_plan(tmp_path / "x.jsonl").run([Case("tiny gpt2", "lora", "peft"), Case("tiny gpt2", "full", "plain")])
    lines = [json.loads(text) for text in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(line["system"], line["repeat"]) for line in lines] == [("peft", 0), ("plain", 0), ("peft", 1)]


def test_nothing_is_started_after_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "_process", lambda self, case: a_line())
    wanted = [Case("tiny gpt2", "lora", system) for system in ("peft", "ours-eager")]
    assert a_plan(tmp_path / "x.jsonl", budget=-1.0).run(wanted) == 2
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.slow
def test_a_process_of_its_own_and_its_timeout(tmp_path: Path) -> None:
    case = Case("tiny gpt2", "lora", "ours-eager")
    plan = a_plan(tmp_path / "x.jsonl")
    plan.one(case, 0)
    plan.timeout = 0.1
    plan.one(case, 1)
    first, second = [json.loads(text) for text in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert first["tokens_per_second"] > 0
    assert second["failed"] == "not done after 0.1 s"


def test_clocks_are_those_of_the_timed_stretch() -> None:
    watch = Watch("cpu")
    watch.samples = [(1.0, [345.0, 70.0, 30.0]), (2.0, [1900.0, 600.0, 50.0]), (2.5, [1980.0, 690.0, 55.0])]
    watch.samples += [(2.7, [1980.0])]  # a line cut short
    found = watch.between(1.5, 3.0)
    assert found == {"sm_clock_mhz": 1940.0, "power_watts": 645.0, "temperature_celsius": 52.5}
    assert watch.between(4.0, 5.0) == {}
    assert watch.between(None, None) == {}


# -- the page -------------------------------------------------------------------------------------------------


def test_medians_spread_and_the_best_peer() -> None:
    lines = [a_line(speed, repeat=n) for n, speed in enumerate((100.0, 110.0, 90.0))]
    lines += [a_line(300.0, system="ours-eager"), a_line(150.0, system="peft-compiled", method="dora")]
    results = Results(lines)
    peft = results.get("tiny gpt2", "lora", "peft")
    assert peft is not None
    assert (peft.speed, peft.spread) == (100.0, pytest.approx(0.2))
    text = page(lines)
    assert "| lora | spectune, eager | 300 | one run | - | - | 1.00 GiB resident | 3.00 | 10 | 1 s | 0% |" in text
    assert (
        "| lora | PEFT, plain loop | 100 | 20.0% of 3 | - | - | 1.00 GiB resident | 1.00 | 10 | 1 s | reference |"
        in text
    )


def test_the_share_of_the_limit_and_the_allocators_peaks() -> None:
    fields = {"peak_tflops": 1.0, "peak_allocated": 3 * 2**30, "peak_reserved": 4 * 2**30, "device": "some GPU"}
    text = page([a_line(500.0, **fields)])
    assert "| 500 | one run | 0.50 | 3.0 GiB | 4.0 GiB |" in text
    assert "## some GPU" in text


def test_a_row_whose_losses_differ_is_marked() -> None:
    text = page([a_line(), a_line(900.0, system="ours-eager", losses=[6.0, 5.1])])
    assert "900 (losses differ)" in text
    assert "2%, more than 0.1%" in text


def test_a_row_of_ours_whose_losses_differ_meets_no_target() -> None:
    fields = {"shape": "Llama-3-8B", "dtype": "bfloat16", "length": 2048}
    lines = [a_line(1.0, **fields), a_line(26_000.0, system="ours-compiled", losses=[6.0, 5.5], **fields)]
    assert "| 26,000 tokens/s | losses differ |" in page(lines)


def test_a_base_in_fp8_is_held_to_its_first_loss() -> None:
    fields = {"shape": "Llama-3-8B", "dtype": "bfloat16", "length": 2048}
    for losses, verdict in (([6.0, 5.5], "met"), ([6.1, 5.0], "losses differ")):
        lines = [a_line(1.0, **fields), a_line(26_000.0, system="ours-fp8", losses=losses, **fields)]
        assert f"| 26,000 tokens/s | {verdict} |" in page(lines)


def test_what_failed_stands_in_the_table() -> None:
    failed = {key: value for key, value in a_line().items() if key not in ("tokens_per_second", "losses")}
    text = page([a_line(), {**failed, "system": "peft-trainer", "failed": "OutOfMemoryError: a | b\nc"}])
    assert "| lora | PEFT + Trainer | not measured: OutOfMemoryError: a \\| b c |" in text


def test_short_rows_have_a_table_of_their_own() -> None:
    fields = {"targets_per_second": 40.0, "padding_share": 0.25}
    speeds = {"real-peft": 200.0, "real-ours-padded-all": 350.0, "real-ours-packed": 700.0}
    lines = [a_line(), *(a_line(speed, system=system, **fields) for system, speed in speeds.items())]
    lines.append(a_line(50.0, shape="tiny llama", system="real-ours-packed", **fields))
    text = page(lines)
    first, second = text.index("tiny gpt2, 2 rows a step:"), text.index("tiny llama, 2 rows a step:")
    memory, name = "- | 1.00 GiB resident", "spectune, packed, loss on completions"
    row = f"| lora | {name} | 700 | 40 | one run | 25% | {memory} | 2.00 | 3.50 | 1 s | 0% |"
    assert first < text.index(row) < second
    assert f"| 50 | 40 | one run | 25% | {memory} | - | - | 1 s | - |" in text[second:]
    assert text.count("### ") == 2


def test_targets_are_met_missed_or_not_measured() -> None:
    shape = "Llama-3-8B"
    lines = [
        a_line(18_500.0, shape=shape, system="ours-compiled", peak_allocated=40 * 2**30),
        a_line(15_000.0, shape=shape, system="unsloth", peak_allocated=46 * 2**30),
        a_line(16_000.0, shape=shape, system="peft-compiled"),
    ]
    results = Results(lines)
    assert Floor(shape, "lora", "ours-compiled", 18_000, 42).check(results)[:2] == ("18,500 tokens/s, 40.0 GiB", True)
    assert Floor(shape, "lora", "ours-compiled", 18_000, 39).check(results)[1] is False
    assert Ratio(shape, "lora", "ours-compiled", "unsloth", 1.0, leaner=True).check(results)[1] is True
    assert Ratio(shape, "lora", "ours-compiled", "peft*", 1.25).check(results).met is False
    assert Floor(shape, "lora", "ours-fp8", 25_000).check(results)[:2] == ("not measured", None)
    text = page(lines)
    assert "| 18,500 tokens/s, 40.0 GiB | met |" in text
    assert "| 1.16 times PEFT + per-block compile | **missed** |" in text


def test_on_a_cpu_the_plain_loops_themselves_are_meant() -> None:
    fields = {"shape": "spectune-tiny", "length": 256}
    lines = [a_line(100.0, **fields), a_line(140.0, system="peft-compiled", **fields)]
    lines += [a_line(120.0, system="ours-compiled", **fields), a_line(160.0, system="ours-eager", **fields)]
    target = next(t for t in TARGETS if isinstance(t, Ratio) and (t.shape, t.method) == ("spectune-tiny", "lora"))
    assert target.check(Results(lines)) == ("1.60 times PEFT, plain loop", True, "ours-eager")


def test_every_target_names_what_there_is() -> None:
    for target in TARGETS:
        assert target.shape in SHAPES
        assert target.text()
        for name in target.system.split("|"):
            assert name == "ours-*" or target.method in SYSTEMS[name].methods
