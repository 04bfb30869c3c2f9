"""What runs leave of the device's memory: bytes that stay allocated after `train` has returned and the delta is off.

    PYTHONPATH=src python -m benchmarks.leaks --out leaks.jsonl --seconds 115       on a CUDA device
    PYTHONPATH=src python -m benchmarks.leaks --out leaks.jsonl --small             a check of this script, on a CPU

For each method ten runs in one process, on one base: as the defaults are, with CUDA graphs, with neither graphs nor
compiler, and (three methods) compiled; then a comparison of three methods, with what is allocated as each of its runs
begins. 0 is right, to the byte. Where something is left, the line has the tensors that Python knows, what is left when
cuBLAS's workspaces are cleared, and where the blocks that one more run leaves were allocated. The modes are processes
of their own, side by side: each counts its own memory. On a CPU the bytes are those of tensors that Python knows.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: mode -> settings; the defaults record blocks of so small a base, and compile none of so short a run
MODES: dict[str, dict[str, Any]] = {
    "neither": {"cuda_graphs": False, "torch_compile": False},
    "graphs": {"cuda_graphs": True, "torch_compile": False, "packing": False, "gradient_checkpointing": False},
    "defaults": {},
    "compiled": {"cuda_graphs": False, "torch_compile": True},
}
COMPILED = ("lora", "prompt", "full")
LENGTH, BATCH = 64, 8


class Memory:
    """What is allocated on a device now, and what of it was not there before."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"

    def settle(self) -> int:
        """Bytes, when all that can be collected is."""
        import torch

        gc.collect()
        if not self.cuda:
            return sum(size for size, _ in self.tensors().values())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated())

    def tensors(self) -> dict[int, tuple[int, str]]:
        """Address -> bytes and shape of what Python knows."""
        import torch
        from torch._subclasses import FakeTensor

        found = {}
        for thing in gc.get_objects():
            if not issubclass(type(thing), torch.Tensor) or isinstance(thing, FakeTensor):
                continue
            if thing.device.type == self.device and thing.layout is torch.strided:
                size = thing.untyped_storage().nbytes()
                if size:
                    what = f"{type(thing).__name__} {tuple(thing.shape)} {str(thing.dtype).removeprefix('torch.')}"
                    found[thing.untyped_storage().data_ptr()] = size, what
        return found

    def blocks(self) -> dict[int, dict[str, Any]]:
        """Address -> block of the allocator that is in use."""
        import torch

        if not self.cuda:
            return {}
        found = {}
        for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
            address = segment["address"]
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    found[address] = {**block, "pool": tuple(segment["segment_pool_id"]), "stream": segment["stream"]}
                address += block["size"]
        return found


def rows_of(folder: Path | None) -> list[dict[str, str]]:
    """Texts that are cut into windows of one length: shapes come back, so blocks are recorded."""
    from spectune import embedded

    if folder is None:
        lines = Path(embedded.TRAIN).read_text("utf-8").splitlines()[:120]
        text = " ".join(json.loads(line)["completion"] for line in lines)
    else:
        text = (folder / "text.txt").read_text("utf-8")[:60_000]
    size = len(text) // 20
    return [{"text": text[i : i + size]} for i in range(0, len(text) - size + 1, size)]


def base_of(args: argparse.Namespace) -> tuple[Any, Any, list[dict[str, str]], str]:
    """Model, tokenizer, rows and device."""
    import spectune

    if args.small:
        return (*spectune.load("spectune-tiny", device="cpu"), rows_of(None), "cpu")
    return (*spectune.load(str(args.bases / "27M"), device="cuda"), rows_of(args.bases / "rows"), "cuda")


def work(args: argparse.Namespace, mode: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of one mode and some methods."""
    from rich.console import Console

    import spectune
    from spectune.deltas import attached
    from spectune.methods import BY_NAME
    from spectune.training.prediction import Predictions

    model, tokenizer, rows, device = base_of(args)
    memory, quiet = Memory(device), Console(file=io.StringIO())
    config = spectune.TrainingConfig(
        max_steps=args.steps, per_device_train_batch_size=BATCH, max_length=LENGTH, learning_rate=1e-4, **MODES[mode]
    )
    for name in names:
        method, plans = BY_NAME[name], Predictions()

        def once(method: Any = method, plans: Predictions = plans) -> None:
            delta = spectune.attach(model, method(), keep_base=method.trains_base)
            spectune.train(model, tokenizer, delta, rows[2:], rows[:2], config, console=quiet, predictions=plans)
            spectune.detach(model, delta.name)

        begin, before, known = time.perf_counter(), memory.settle(), memory.tensors()
        line: dict[str, Any] = {"mode": mode, "method": name, "left": []}
        try:
            for _ in range(args.runs):
                once()
                line["left"].append(memory.settle() - before)
            if any(line["left"]):
                line |= cause(memory, before, known, once)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:600]
            if "default" in attached(model):
                spectune.detach(model, "default")
        yield {**line, "seconds": round(time.perf_counter() - begin, 1), "base_bytes": before}


def cause(memory: Memory, before: int, known: dict[int, tuple[int, str]], once: Callable[[], None]) -> dict[str, Any]:
    """What is left, as far as it can be said: tensors, blocks, and what one more run leaves and from where."""
    import torch

    new = [what for address, what in memory.tensors().items() if address not in known]
    found: dict[str, Any] = {
        "tensors": [f"{size} bytes: {what}" for size, what in sorted(new, reverse=True)[:10]],
        "tensor_bytes": sum(size for size, _ in new),
    }
    if not memory.cuda:
        return found
    blocks = memory.blocks()
    torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
    try:
        once()
        memory.settle()
        later = [block for address, block in memory.blocks().items() if address not in blocks]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    origins = Counter[str]()
    for block in later:
        origins[f"{block['size']} bytes, stream {block['stream']}, pool {block['pool']}: {_origin(block)}"] += 1
    found["one_more_run"] = [f"{count} x {what}" for what, count in origins.most_common(10)]
    found["blocks"] = Counter(str(block["size"]) for block in blocks.values()).most_common(10)
    torch._C._cuda_clearCublasWorkspaces()
    found["left_without_workspaces"] = memory.settle() - before
    return found


def _origin(block: dict[str, Any]) -> str:
    """The innermost frames of what allocated a block, those of spectune first."""
    frames = block.get("frames") or []
    lines = [f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in frames]
    ours = [line for line, frame in zip(lines, frames, strict=True) if "spectune" in frame["filename"]]
    return " < ".join([*lines[:3], "...", *ours[:3]]) if lines else "no frames"


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A comparison: what is allocated, beside base and delta, as each of its runs begins, and at its end."""
    from rich.console import Console

    import spectune
    from spectune.comparing import job

    model, tokenizer, rows, device = base_of(args)
    memory, plain = Memory(device), job.train  # type: ignore[attr-defined]
    line: dict[str, Any] = {"mode": "compare", "method": "+".join(COMPILED), "left": [], "runs": []}
    before, begin = memory.settle(), time.perf_counter()

    def noted(model: Any, tokenizer: Any, delta: Any, *rest: Any, **keywords: Any) -> Any:
        own = {p.data_ptr(): p.numel() * p.element_size() for p in delta.parameters()}
        base = {p.data_ptr() for p in model.parameters()}
        line["left"].append(memory.settle() - before - sum(size for place, size in own.items() if place not in base))
        line["runs"].append(delta.method.name)
        return plain(model, tokenizer, delta, *rest, **keywords)

    job.train = noted  # type: ignore[attr-defined,assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = spectune.TrainingConfig(max_steps=args.steps, per_device_train_batch_size=BATCH, max_length=LENGTH)
            spectune.compare(
                model, rows[2:], rows[:2], methods=COMPILED, tokenizer=tokenizer, output_dir=Path(folder) / "run",
                config=config, preset="quick", generate_rows=2, console=Console(file=io.StringIO()),
            )  # fmt: skip
        line["left"].append(memory.settle() - before)
        line["runs"].append("the end")
        if memory.cuda and any(line["left"]):
            import torch

            torch._C._cuda_clearCublasWorkspaces()
            line["left_without_workspaces"] = memory.settle() - before
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:600]
    finally:
        job.train = plain  # type: ignore[attr-defined]
    yield {**line, "seconds": round(time.perf_counter() - begin, 1), "base_bytes": before}


def orders(modes: list[str]) -> list[str]:
    """What each process does: a mode, and methods; compiling takes longest."""
    from spectune.methods import BY_NAME

    found = []
    for mode in modes:
        if mode == "compare":
            found.append(mode)
        elif mode == "compiled":
            found += [f"{mode} {name}" for name in COMPILED]
        else:
            found += [" ".join((mode, *list(BY_NAME)[half::2])) for half in range(2)]
    return found


def said(line: dict[str, Any]) -> str:
    """A line for people."""
    most = max((abs(left) for left in line["left"]), default=0)
    head = f"{line['mode']:<9} {line['method']:<18} {len(line['left']):>3} runs, {line['seconds']:5.1f} s: "
    head += f"FAILED: {line['error']}" if "error" in line else f"{most:,} bytes left"
    if most:
        pairs = itertools.zip_longest(line.get("runs", []), line["left"], fillvalue="")
        head += "\n    after each: " + ", ".join(f"{run} {left:,}".strip() for run, left in pairs)
        if "left_without_workspaces" in line:
            head += f"\n    without cuBLAS's workspaces: {line['left_without_workspaces']:,}"
        for key in ("tensors", "one_more_run", "blocks"):
            if line.get(key):
                head += f"\n    {key}: " + "\n        ".join(map(str, line[key]))
    return head


def verdict(lines: list[dict[str, Any]]) -> str:
    """The table: bytes left by method and mode."""
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    methods = list(dict.fromkeys(line["method"] for line in lines))
    most = {
        (line["mode"], line["method"]): "failed" if "error" in line else f"{max(map(abs, line['left'])):,}"
        for line in lines
    }
    parts = [f"| bytes left | {' | '.join(modes)} |", f"|---|{'---|' * len(modes)}"]
    parts += [f"| {name} | {' | '.join(most.get((mode, name), '-') for mode in modes)} |" for name in methods]
    clean = sum(value == "0" for value in most.values())
    return "\n".join([*parts, "", f"{clean} of {len(most)} leave nothing"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines, written anew")
    add("--runs", type=int, default=10)
    add("--steps", type=int, default=10, help="of a run; blocks are replayed from the sixth on")
    add("--seconds", type=float, default=1e9, help="of the whole; what still runs then is stopped")
    add("--modes", nargs="*", default=[*MODES, "compare"])
    add("--bases", type=Path, default=Path(tempfile.gettempdir()) / "ordinary-bases")
    add("--payload", type=Path, default=ROOT / ".gpu/ordinary", help="see ordinary_data.py")
    add("--small", action="store_true", help="the embedded base, on the CPU")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        mode, *names = args.worker.split()
        for line in compare(args) if mode == "compare" else work(args, mode, names):
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(said(line), flush=True)
        return 0
    from benchmarks.ordinary_data import make_bases, unpack

    if not args.small:
        unpack(args.payload, args.bases)
        make_bases(args.bases, {"27M": None}, "cuda")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)
    begin = time.monotonic()
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.leaks", *sys.argv[1:], "--worker", order], env=environment)
        for order in orders(args.modes)
    ]
    for worker in workers:
        try:
            worker.wait(max(0.0, args.seconds - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            print("out of time: a process is stopped", flush=True)
            worker.kill()
            worker.wait()
    lines = [json.loads(text) for text in args.out.read_text("utf-8").splitlines()] if args.out.exists() else []
    print(verdict(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
