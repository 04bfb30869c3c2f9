"""Two commands at 8B, each alone on the card: what they take of time. Called by `ordinary.py`.

`compare`: `spectune compare --quick` of lora, prompt and bitfit on 3,000 rows of E2E, 30 steps of 64, once with each
of several source trees. `packed`: `spectune train` of LoRA on packed rows of E2E, against `benchmarks.step_speed`'s
whole rows with about as many tokens a step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ordinary_data import READY

ROOT = Path(__file__).parents[1]
METHODS = ("lora", "prompt", "bitfit")


def environment(tree: Path = ROOT) -> dict[str, str]:
    """Of a process that runs the spectune of a source tree (or of its `src`)."""
    source = tree / "src" if (tree / "src").is_dir() else tree
    paths = [str(source), str(ROOT)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }


def wait_for(folder: Path, maker: subprocess.Popen[bytes]) -> None:
    """Until a base is there."""
    while not (folder / READY).exists():
        if maker.poll() is not None and not (folder / READY).exists():
            raise SystemExit(f"{folder} was not made: its process ended with {maker.returncode}")
        time.sleep(0.2)


def timed(words: Sequence[str], env: dict[str, str], log: Path, timeout: float) -> tuple[float, int | None]:
    """Seconds of a command and its exit code; None where it was stopped after `timeout`."""
    begin = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(words), cwd=log.parent, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    return time.perf_counter() - begin, code


def compared(
    base: Path, rows: Path, trees: Sequence[Path], out: Path, timeout: float, *, small: bool = False
) -> list[dict[str, Any]]:
    """The same comparison with each tree, one after another; one JSON line each, and a line for people."""
    lines: list[dict[str, Any]] = []
    for tree in trees:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = folder / "rows.jsonl"
            data.write_text("".join(rows.read_text("utf-8").splitlines(keepends=True)[:3000]), "utf-8")
            words = [
                sys.executable, "-m", "spectune", "compare", "--quick", "--model", str(base), "--data", str(data),
                "--methods", ",".join(METHODS), "--output-dir", str(folder / "run"),
                "--set", f"max_steps={8 if small else 30}",
                "--set", f"per_device_train_batch_size={8 if small else 64}", *(["--device", "cpu"] if small else []),
            ]  # fmt: skip
            seconds, code = timed(words, environment(tree), folder / "log", timeout)
            line: dict[str, Any] = {
                "what": "compare",
                "base": base.name,
                "tree": str(tree),
                "seconds": seconds,
                "exit": code,
            }
            line |= _comparison(folder / "run", folder / "log")
            shutil.copy(folder / "log", out.parent / f"compare-{len(lines) + 1}.txt")
        lines.append(line)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(said_of_comparison(line), flush=True)
    if len(lines) > 1 and all("verdict" in line for line in lines):
        first, last = lines[0], lines[-1]
        same = first["verdict"] == last["verdict"]
        print(
            f"{first['seconds']:.0f} s -> {last['seconds']:.0f} s ({last['seconds'] / first['seconds']:.2f}); the "
            f"verdict is {'the same' if same else 'ANOTHER'}"
        )
    return lines


def _comparison(folder: Path, log: Path) -> dict[str, Any]:
    path = folder / "comparison.json"
    if not path.exists():
        return {"error": " / ".join(log.read_text("utf-8", errors="replace").strip().splitlines()[-3:])[-600:]}
    content = json.loads(path.read_text("utf-8"))
    kept = (
        "method", "valid_loss", "judged_loss", "learning_rate", "train_seconds", "evaluation_seconds",
        "train_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes", "seconds_by_phase",
    )  # fmt: skip
    return {
        "verdict": [sorted(sorted(group) for group in content["verdict"][key]) for key in ("groups", "order")],
        "sentences": content["verdict"]["sentences"],
        "runs": [{key: run.get(key) for key in kept if run.get(key) is not None} for run in content["runs"]],
        "searched_steps": sum(trial["steps"] for search in content["searches"].values() for trial in search["trials"]),
        "phases": [content.get("seconds_by_phase"), *(arm.get("seconds_by_phase") for arm in content["arms"])],
        "failed": content["failed"],
    }


def said_of_comparison(line: dict[str, Any]) -> str:
    head = f"{line['tree']}: compare --quick took {line['seconds']:.0f} s"
    if "error" in line:
        return f"{head}, FAILED: {line['error']}"
    steps = sum(run["train_seconds"] for run in line["runs"])
    head += f", its final runs' steps {steps:.0f} s, {line['searched_steps']} steps of search"
    for run in line["runs"]:
        peaks = run["peak_memory_bytes"]
        head += (
            f"\n    {run['method']:<8} rate {run['learning_rate']:.3g}, loss "
            f"{run.get('judged_loss', run['valid_loss']):.4f}, {run['train_seconds']:.0f} s of steps, "
            f"{run.get('evaluation_seconds', 0):.0f} s of judging, allocated "
            f"{peaks.get('train_allocated', 0) / 1e9:.1f} GB, reserved {peaks.get('train_reserved', 0) / 1e9:.1f} GB"
        )
        if phases := run.get("seconds_by_phase"):
            head += f"\n             {phases}"
    if line["phases"]:
        head += f"\n    phases: {line['phases']}"
    return f"{head}\n    verdict: {' '.join(line['sentences'])}"


def packed(base: Path, rows: Path, out: Path, steps: int, timeout: float, *, small: bool = False) -> dict[str, Any]:
    """`train` on packed rows, then step_speed on whole rows with as many tokens a step as is possible."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            sys.executable, "-m", "spectune", "train", "--model", str(base), "--data", str(rows), "--method", "lora",
            "--output-dir", str(folder / "run"), "--set", f"max_steps={steps}",
            "--set", f"per_device_train_batch_size={8 if small else 64}", *(["--device", "cpu"] if small else []),
        ]  # fmt: skip
        seconds, code = timed(words, environment(), folder / "log", timeout)
        said = (folder / "log").read_text("utf-8", errors="replace")
        shutil.copy(folder / "log", out.parent / "packed-train.txt")
        if code != 0:
            raise SystemExit(f"train ended with {code}: {said[-600:]}")
        result = json.loads((folder / "run/result.json").read_text("utf-8"))
        machine = json.loads((folder / "run/environment.json").read_text("utf-8"))
        tokens = result["train_tokens"] / result["steps"]
        peer = _step_speed(folder, tokens, timeout, small=small)
    line = {
        "what": "packed", "base": base.name, "steps": result["steps"], "tokens_a_step": tokens, "seconds": seconds,
        "tokens_per_second": result["train_tokens_per_second"], "train_seconds": result["train_seconds"],
        "phases": result.get("seconds_by_phase"),
        "execution": {key: machine.get(key) for key in ("torch_compile", "cuda_graphs", "gradient_checkpointing")},
        "planned": result["predicted_memory_bytes"], "measured": result["peak_memory_bytes"], "padded": peer,
    }  # fmt: skip
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"train, packed: {line['tokens_per_second']:,.0f} tokens/s, {tokens:,.0f} tokens a step, {result['steps']} "
        f"steps in {result['train_seconds']:.0f} s, the command {seconds:.0f} s; {line['execution']}; over all steps "
        f"{result['train_tokens'] / result['train_seconds']:,.0f} tokens/s"
    )
    for one in peer:
        if "tokens_per_second" not in one:
            print(f"step_speed, {one.get('system')}: {one.get('failed') or one.get('refused')}")
            continue
        ratio = line["tokens_per_second"] / one["tokens_per_second"]
        print(
            f"step_speed, {one['system']}: {one['tokens_per_second']:,.0f} tokens/s, {one['rows']} rows of "
            f"{one['length']} tokens; packed train is {ratio:.2f} of it"
        )
    return line


def _step_speed(folder: Path, tokens: float, timeout: float, *, small: bool) -> list[dict[str, Any]]:
    shape, length = ("tiny llama", 32) if small else ("Llama-3-8B", 2048)
    out = folder / "step_speed.jsonl"
    words = [
        sys.executable, "-m", "benchmarks.step_speed", "--out", str(out), "--shapes", shape, "--methods", "lora",
        "--systems", "ours-eager" if small else "ours-compiled", "--rows", str(max(1, round(tokens / length))),
        "--quick", "--repeats", "1", *(["--device", "cpu", "--tiny"] if small else []),
    ]  # fmt: skip
    timed(words, environment(), folder / "step-log", timeout)
    if not out.exists():
        return [{"system": "none", "failed": (folder / "step-log").read_text("utf-8", errors="replace")[-600:]}]
    return [json.loads(text) for text in out.read_text("utf-8").splitlines()]
