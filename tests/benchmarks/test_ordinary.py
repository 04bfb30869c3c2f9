"""The benchmark of ordinary runs: that each cell becomes a line, whatever becomes of it, and that the tables are right.

Commands are small scripts here, that leave what spectune would."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.leaks import orders, said, verdict
from benchmarks.ordinary import Scheduler
from benchmarks.ordinary_cells import BASES, DATA, Cell, cells
from benchmarks.ordinary_data import pack, unpack
from benchmarks.ordinary_page import newest, page, runs, table

from spectune.methods import BY_NAME

RESULT = {
    "method": "lora", "predicted_memory_bytes": {"peak_allocated": 100, "peak_reserved": 200},
    "peak_memory_bytes": {"train_allocated": 101, "train_reserved": 230, "valid_allocated": 50}, "steps": 3,
    "train_tokens_per_second": 10.0,
}  # fmt: skip
LEAVES = "import sys, os; os.makedirs(sys.argv[1]); open(sys.argv[1] + sys.argv[3], 'w').write(sys.argv[2])"
FAILS = "import sys; print('Traceback'); sys.exit('error: CUDA out of memory')"


def leaving(content: dict[str, Any], name: str = "/result.json") -> Callable[[Path], list[str]]:
    return lambda folder: [sys.executable, "-IS", "-c", LEAVES, str(folder), json.dumps(content), name]


def failing(script: str) -> Callable[[Path], list[str]]:
    return lambda folder: [sys.executable, "-IS", "-c", script]


def cell(data: str, *, command: str = "train", claim: float = 1, methods: tuple[str, ...] = ("lora",)) -> Cell:
    return Cell("8B", data, command, methods, (), claim)


def scheduled(folder: Path, commands: dict[Cell, Callable[[Path], list[str]]], **settings: Any) -> list[dict[str, Any]]:
    by_name = {one.name: command for one, command in commands.items()}
    found: dict[str, Any] = {"limit": 10, "jobs": 4, "timeout": 60, "deadline": time.monotonic() + 60}
    found |= {"ready": lambda _: True, "may_come": lambda: False, "scratch": folder} | settings
    scheduler = Scheduler(folder / "o.jsonl", line=lambda one, output: by_name[one.name](output), **found)
    scheduler.run(list(commands))
    return [json.loads(text) for text in (folder / "o.jsonl").read_text("utf-8").splitlines()]


def test_each_run_of_a_cell_is_read_and_a_cell_that_fails_is_a_line_with_its_error(tmp_path: Path) -> None:
    both = cell("packed", command="compare", methods=("lora", "prompt"))
    lines = scheduled(
        tmp_path,
        {
            cell("short"): leaving(RESULT),
            both: leaving({"runs": [RESULT, {**RESULT, "method": "prompt"}]}, "/comparison.json"),
            cell("text"): failing("raise SystemExit('error: no such file')"),
        },
        jobs=1,
    )

    assert [[run["method"] for run in line["runs"]] for line in lines] == [["lora"], ["lora", "prompt"], []]
    assert [line.get("error") for line in lines] == [None, None, "error: no such file"]
    assert (tmp_path / "logs/8B_text_train_lora.txt").read_text("utf-8").strip() == "error: no such file"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["logs"]


def test_a_cell_that_lacked_memory_beside_others_runs_once_more_alone(tmp_path: Path) -> None:
    beside = failing("import time; time.sleep(0.4)")
    lines = scheduled(tmp_path, {cell("short"): failing(FAILS), cell("text"): beside})

    assert [line["cell"] for line in lines] == ["8B short train lora", "8B text train lora", "8B short train lora"]
    assert [line["beside"] for line in lines] == [1, 1, 0]


def test_claims_of_cells_that_run_at_once_stay_below_the_limit(tmp_path: Path) -> None:
    lines = scheduled(tmp_path, {cell(data, claim=6): leaving(RESULT) for data in DATA})

    assert [line["beside"] for line in lines] == [0, 0, 0, 0]
    assert [line["data"] for line in lines] == list(DATA)


def test_what_runs_at_the_deadline_is_stopped_and_has_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.jsonl").touch()
    sleeps = failing("import time; time.sleep(60)")
    lines = scheduled(tmp_path, {cell("short"): sleeps, cell("text"): sleeps}, jobs=1, deadline=time.monotonic() + 0.3)

    assert lines == []
    assert "1 cells not begun, stopped: 8B short train lora" in capsys.readouterr().out


def test_a_cell_that_hangs_is_stopped_and_said(tmp_path: Path) -> None:
    [line] = scheduled(tmp_path, {cell("short"): failing("import time; time.sleep(60)")}, timeout=0.3)

    assert line["error"] == "not done after 0.3 s"


def test_there_are_48_runs_of_train_and_the_first_are_of_each_base_and_kind_of_rows() -> None:
    found = cells(BASES)
    alone = [one for one in found if one.command == "train" and not one.note]

    assert len(alone) == 48
    assert len({one.name for one in found}) == len(found)
    assert {(one.base, one.data) for one in found[:16]} == {(base, data) for base in BASES for data in DATA}
    assert [one.name for one in cells(BASES, only="27M text train")] == [
        f"27M text train {rest}" for rest in ("lora", "prompt", "full", "lora compiled")
    ]


def test_the_tables_are_of_the_newest_lines(tmp_path: Path) -> None:
    execution = {"torch_compile": False, "cuda_graphs": True, "device": "H200", "packages": {"torch": "2.11"}}
    run = {
        "method": "lora", "planned": RESULT["predicted_memory_bytes"], "measured": RESULT["peak_memory_bytes"],
        "recomputed": False, "execution": execution,
    }  # fmt: skip
    line = {"cell": "a", "base": "8B", "data": "short", "command": "train", "note": "", "runs": [run], "seconds": 30.4}
    worse = {**line, "cell": "b", "base": "1B", "runs": [{**run, "measured": {"train_allocated": 80}}]}
    failed = {**line, "cell": "c", "runs": [], "error": "out of\n| memory"}
    out = tmp_path / "o.jsonl"
    out.write_text("".join(json.dumps(each) + "\n" for each in (failed | {"cell": "a"}, worse, line, failed)), "utf-8")
    lines = newest(out)

    text = table(lines)
    assert "| 8B | 1 | 1.0% | +1.0% | 15.0% | +15.0% |" in text
    assert "| all | 2 | 10.5% | -20.0% | 15.0% | +15.0% |" in text
    assert "allocated: median 10.5% (at most 2%), worst 20.0% (at most 10%): not met" in text
    whole = page(lines)
    assert "on H200, torch 2.11, transformers None." in whole
    assert "| valid 0.00 GB | yes, no, no | 30 |" in whole
    assert "| c | out of / memory |" in whole
    assert len(list(runs(lines))) == 2


def test_what_is_carried_arrives_bit_for_bit(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    base = shared / "bases/gpt2-27m"
    for folder in (base, shared / "data/e2e", shared / "data/chat_sgd", shared / "corpus"):
        folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    weights = bytes(range(256)) * 3 + b"odd"
    (base / "model.safetensors").write_bytes(weights)
    for name in ("train", "valid"):
        (shared / f"data/e2e/{name}.jsonl").write_text('{"prompt": "é", "completion": "b"}\n' * 3300, "utf-8")
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}], "id": "1"})
    (shared / "data/chat_sgd/train.jsonl").write_text(f"{chat}\n" * 3, "utf-8")
    (shared / "corpus/val.txt").write_text("text")

    pack(tmp_path / "carried", shared)
    unpack(tmp_path / "carried", tmp_path / "bases")

    assert (tmp_path / "bases/27M/model.safetensors").read_bytes() == weights
    assert (tmp_path / "bases/27M-chat/model.safetensors").read_bytes() == weights
    assert "im_start" in json.loads((tmp_path / "bases/27M-chat/tokenizer_config.json").read_text())["chat_template"]
    assert len((tmp_path / "bases/rows/rows.jsonl").read_text("utf-8").splitlines()) == 3200
    assert json.loads((tmp_path / "bases/rows/chat.jsonl").read_text("utf-8").splitlines()[0]).keys() == {"messages"}


def test_bytes_that_are_left_are_said_by_method_and_mode() -> None:
    line = {"mode": "graphs", "method": "lora", "left": [0, 0], "seconds": 1.0}
    lines = [line, {**line, "method": "full", "left": [0, 4096], "left_without_workspaces": 0}]
    lines.append({**line, "mode": "compare", "left": [], "error": "no"})

    text = verdict(lines)
    assert "| lora | 0 | failed |" in text
    assert "| full | 4,096 | - |" in text
    assert text.endswith("1 of 3 leave nothing")
    assert "after each: 0, 4,096" in said(lines[1])
    assert "without cuBLAS's workspaces: 0" in said(lines[1])


def test_processes_cover_every_mode_and_method_once() -> None:
    found = [tuple(order.split()) for order in orders(["neither", "compiled", "compare"])]
    assert sorted(name for mode, *names in found if mode == "neither" for name in names) == sorted(BY_NAME)
    assert [names for mode, *names in found if mode != "neither"] == [["lora"], ["prompt"], ["full"], []]
