"""Two processes against one: speed at 8B, the same losses and weights, and how runs on several devices end.

    PYTHONPATH=src python benchmarks/two_devices.py --out two_devices.jsonl --seconds 230
    PYTHONPATH=src python benchmarks/two_devices.py --tiny --out /tmp/two/two_devices.jsonl     # two CPU processes
    PYTHONPATH=src python benchmarks/two_devices.py --out two_devices.jsonl --page docs/results/two_devices.md

- speed: LoRA r16 (all linears) on a base of Llama-3-8B's shape, random weights made on the device, bfloat16, 4 rows of
  2,048 tokens a device, through the training loop. One device first, the other one waiting, then both.
- same: every method on a small base in float32 without dropout (its masks are each process's own), five steps of
  `train`, two devices against one with the same rows a step. Not at 8B: bfloat16 rounds more than the difference that
  is looked for.
- commands: `torchrun -m spectune train` on a base of gpt2-27m's shape: lora, prompt, full; Ctrl-C, and the run gone on
  with on one device; a device whose memory is taken, before the run and during it; more processes than devices.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: NVLink multicast stays off: a program that uses it can put a host's GPUs out of service
QUIET = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
WANTED_RATIO, TOLERANCE = 1.85, 1e-5


def main() -> None:
    given = arguments()
    if given.page is not None:
        given.page.write_text(page(read(given.out)), encoding="utf-8")
    elif given.work is None:
        drive(given)
    else:
        work(given)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL; parts that are there are left out")
    parser.add_argument("--seconds", type=float, default=230, help="no part is begun after so many")
    parser.add_argument("--tiny", action="store_true", help="two CPU processes and small shapes: a check of this file")
    parser.add_argument("--compile", action="store_true", help="compile the 8B's blocks")
    parser.add_argument("--steps", type=int, default=8, help="of the 8B, timed")
    parser.add_argument("--page", type=Path, help="write the page of what --out holds")
    parser.add_argument("--work", choices=["speed", "same", "oom", "refused"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the driver -----------------------------------------------------------------------------------------------


def drive(given: argparse.Namespace) -> None:
    begun, given.out = time.monotonic(), given.out.absolute()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = {entry["part"] for entry in read(given.out)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts = {"speed": speed, "commands": commands, "same": same}
        for part, run in parts.items():
            if part in done or time.monotonic() - begun > given.seconds:
                print(f"{part}: left out ({'there already' if part in done else 'no time left'})")
                continue
            start = time.monotonic()
            found = run(given, folder)
            keep(given.out, {"part": part, "took_seconds": round(time.monotonic() - start, 1), **found})
    print(page(read(given.out)))


def torchrun(*arguments: str | Path, processes: int = 2, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return started([*command, *arguments], **options)


def started(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **QUIET, "PYTHONPATH": path, **options.pop("env", {})}
    return subprocess.Popen(
        list(map(str, command)), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def own(given: argparse.Namespace, part: str, folder: Path) -> list[str | Path]:
    """The arguments of this file as a process that does a part."""
    flags = [name for name in ("tiny", "compile") if getattr(given, name)]
    settings = ["--steps", str(given.steps), "--work", part, "--folder", folder, "--out", given.out]
    return [Path(__file__), *(f"--{name}" for name in flags), *settings]


def speed(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    process = torchrun(*own(given, "speed", folder))
    printed = waited(process, 200)
    file = folder / "speed.json"
    return json.loads(file.read_text()) if file.is_file() else {"failed": tail(printed, 40)}


def same(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both at once: what one device computes does not depend on what else runs there."""
    alone, two = (started([sys.executable, *own(given, "same", folder)]), torchrun(*own(given, "same", folder)))
    printed = waited(two, 150), waited(alone, 150)
    files = [folder / "same-2.json", folder / "same-1.json"]
    for file, text in zip(files, printed, strict=True):
        if not file.is_file():
            return {"failed": tail(text, 40)}
    from safetensors.torch import load_file

    both, one = (json.loads(file.read_text()) for file in files)
    found: dict[str, Any] = {}
    for method, expected in one.items():
        ours = both[method]
        if "error" in expected or "error" in ours:
            found[method] = {"error": [expected.get("error"), ours.get("error")]}
            continue
        pairs = list(zip(ours["losses"], expected["losses"], strict=True))
        both_states, state = (load_file(folder / f"same-{size}-{method}.safetensors") for size in (2, 1))
        found[method] = {
            "loss": max(abs(a - b) for a, b in pairs),
            "weights": max((both_states[name] - tensor).abs().max().item() for name, tensor in state.items()),
            "losses_of_one": expected["losses"],
        }
    return {"methods": found}


def commands(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All at once but for what has to wait: they are looked at, not timed."""
    base = made_base(folder / "base", given.tiny)
    size, steps = (4, 4) if given.tiny else (32, 30)
    device = ["--device", "cpu"] if given.tiny else ["--device", "cuda", "--dtype", "bfloat16"]

    def train(name: str, *more: str, method: str = "lora") -> list[str]:
        told = ["--set", f"per_device_train_batch_size={size}", *more]
        out = ["--output-dir", str(folder / name)]
        return ["-m", "spectune", "train", "--model", str(base), *device, "--method", method, *told, *out]

    long = ["--set", "max_steps=20000", "--set", "eval_steps=20000", "--set", "save_steps=20000"]
    long += ["--set", "torch_compile=false"]
    few = ["--set", f"max_steps={steps}", "--set", "torch_compile=false"]
    running = {name: torchrun(*train(name, *few, method=name)) for name in ("lora", "prompt", "full")}
    running["interrupted"] = torchrun(*train("interrupted", *long))
    running["three"] = torchrun(*train("three", *few), processes=3)
    interrupt(running["interrupted"], folder / "interrupted" / "metrics.jsonl")
    found = {name: ended(process, folder / name) for name, process in running.items()}
    going_on = ["--resume", "--set", "max_steps=20000", "--set", f"per_device_train_batch_size={2 * size}"]
    alone = started([sys.executable, *train("interrupted", *long, *going_on)])
    interrupt(alone, folder / "interrupted" / "metrics.jsonl", more=True)
    found["goes on alone"] = ended(alone, folder / "interrupted")
    for part in () if given.tiny else ("refused", "oom"):  # takes all that is free, so nothing else may run
        found[part] = ended(torchrun(*own(given, part, folder)), folder / part)
    return {"commands": found}


def interrupt(process: subprocess.Popen[str], metrics: Path, more: bool = False, patience: float = 90) -> None:
    """Ctrl-C, a second after the first step is written (`more`: after one more than there are)."""
    size, until = metrics.stat().st_size if more and metrics.is_file() else 0, time.monotonic() + patience
    while process.poll() is None and time.monotonic() < until:
        if metrics.is_file() and metrics.stat().st_size > size:
            time.sleep(1)
            break
        time.sleep(0.1)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)


def ended(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    printed = waited(process, 100)
    lines = printed.splitlines()
    result = folder / "result.json"
    kept = json.loads(result.read_text()) if result.is_file() else {}
    return {
        "exit_code": process.returncode,
        "waited_seconds": round(time.monotonic() - start, 1),
        "said": [line for line in lines if line.startswith(("error:", "stopped:", "going on", "step "))],
        "warnings": [line for line in lines if re.search(r"\bwarn(ing)?\b", line, re.I) and "OMP_NUM" not in line][:5],
        "exit_codes": [line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("exitcode")],
        "tokens_per_second": kept.get("train_tokens_per_second"),
        "valid_loss": [kept.get("base_valid_loss"), kept.get("valid_loss")],
        "processes": kept.get("processes"),
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        **({"printed": tail(printed, 15)} if process.returncode and "stopped:" not in printed else {}),
    }


def waited(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            return process.communicate(timeout=40)[0] + "\n(did not end by itself)"
        except subprocess.TimeoutExpired:
            process.kill()
            return "(did not end)"


def made_base(folder: Path, tiny: bool) -> Path:
    """gpt2-27m's shape with random weights and the embedded base's tokenizer."""
    import torch
    from shapes import CONFIGS, build
    from transformers import GPT2Config

    from spectune.storage import load_tokenizer

    tokenizer = load_tokenizer("spectune-tiny")
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2} if tiny else {"n_embd": 384, "n_layer": 12, "n_head": 6}
    config = GPT2Config(vocab_size=CONFIGS["spectune-tiny"]().vocab_size, n_positions=512, **shape)
    build(config, torch.device("cpu"), torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- what one process does ------------------------------------------------------------------------------------


def work(given: argparse.Namespace) -> None:
    if given.work == "speed":
        measure_speed(given)
    elif given.work == "same":
        train_small(given)
    else:
        run_short_of_memory(given)


def device_of(tiny: bool) -> Any:
    from spectune.storage import resolve_device

    return resolve_device("cpu" if tiny else "cuda")


def measure_speed(given: argparse.Namespace) -> None:
    import copy

    import torch
    from shapes import CONFIGS, build

    from spectune.training.distribution import World
    from spectune.training.membership import membership

    rows, length = (2, 32) if given.tiny else (4, 2048)
    name = "tiny llama" if given.tiny else "Llama-3-8B"
    device, dtype = device_of(given.tiny), torch.float32 if given.tiny else torch.bfloat16
    with membership():
        world = World(device)
        torch.manual_seed(0)
        start = time.monotonic()
        model = build(CONFIGS[name](), device, dtype)
        found: dict[str, Any] = {"shape": name, "rows": rows, "length": length, "compiled": given.compile}
        found["build_seconds"] = time.monotonic() - start
        single = copy.copy(world)
        single.size, single.rank = 1, 0
        if world.leads:
            found["one"] = loop_speed(given, model, single, rows, length)
        world.barrier()
        two = loop_speed(given, model, world, rows, length)
        if world.leads:
            found |= {"two": two, "ratio": two["tokens_per_second"] / found["one"]["tokens_per_second"]}
            found["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
            (given.folder / "speed.json").write_text(json.dumps(found))


def loop_speed(given: argparse.Namespace, model: Any, world: Any, rows: int, length: int) -> dict[str, Any]:
    """Steps of the training loop, as `train` takes them on so many devices."""
    import torch

    from spectune.blocks.execution import Execution, Packing
    from spectune.data import Example, Row
    from spectune.deltas import attach, detach
    from spectune.inference import wait_for
    from spectune.methods import LoRA
    from spectune.training import TrainingConfig
    from spectune.training.loop import Loop
    from spectune.training.optimizer import MasterAdamW
    from spectune.training.run_state import RunState
    from spectune.training.step_batches import Batches

    warm, count = 3, given.steps
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (rows * world.size, length), generator=generator)
    examples = [Example(row, 0, Row(origin="", text="")) for row in ids.tolist()]
    config = TrainingConfig(
        per_device_train_batch_size=rows, max_steps=warm + count, learning_rate=1e-4, lr_scheduler_type="constant",
        warmup_steps=0, torch_compile=given.compile, cuda_graphs=False, packing=False, gradient_checkpointing=False,
    )  # fmt: skip
    delta = attach(model, LoRA(r=16, lora_alpha=32), "bench", seed=0)
    optimizer = MasterAdamW(list(delta.parameters()), config, 1e-4)
    batches = Batches(examples, config, Packing(), world)
    execution = Execution(given.compile, False, False, True, Packing())
    loop = Loop(RunState(delta, optimizer, batches, [], config, 1e-4, warm + count), execution)
    window, losses = [list(range(len(examples)))], []
    with loop.running():
        for number in range(warm + count):
            if number == warm:
                wait_for(model.device)
                start = time.perf_counter()
            loop.begin([window[0]])
            if number >= loop.max_in_flight:
                losses.append(loop.finish())
        while loop._in_flight:
            losses.append(loop.finish())
        seconds = time.perf_counter() - start
    kept = [loss for loss in losses if loss is not None]
    found = {
        "tokens_per_second": count * len(examples) * length / seconds, "seconds_a_step": seconds / count,
        "losses": [kept[0], kept[-1]],
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if model.device.type == "cuda" else None,
    }  # fmt: skip
    optimizer.close()
    detach(model, "bench")
    return found


def train_small(given: argparse.Namespace) -> None:
    """Every method on a small base in float32; the same rows a step on any number of devices."""
    import torch
    from rich.console import Console
    from safetensors.torch import save_file
    from shapes import CONFIGS, build

    from spectune.deltas import attached
    from spectune.errors import SpectuneError
    from spectune.methods import METHODS
    from spectune.storage import load_tokenizer
    from spectune.torchrun import Place
    from spectune.training import TrainingConfig, train
    from spectune.training.distribution import World
    from spectune.training.membership import membership

    place, device, found = Place.from_environment(), device_of(given.tiny), {}
    words = ["the", "a", "of", "and", "to", "in", "is", "it", "on", "as", "for", "with", "was", "at", "by"]
    rows = [{"text": " ".join(words[(i * j) % len(words)] for j in range(5 + 3 * i % 40))} for i in range(1, 42)]
    config = CONFIGS["spectune-tiny"]()
    for key in vars(config):
        if key.endswith(("pdrop", "dropout")):
            setattr(config, key, 0.0)  # masks differ by process
    with membership():
        World(device)
        for method in METHODS:
            torch.manual_seed(0)
            model = build(config, device, torch.float32).eval()
            settings = TrainingConfig(
                per_device_train_batch_size=8 // place.size, gradient_accumulation_steps=2, max_steps=5,
                learning_rate=1e-4, eval_steps=1, max_length=128, torch_compile=False,
                output_dir=given.folder / f"same-{place.size}-{method.model_fields['name'].default}",
            )  # fmt: skip
            name = method.model_fields["name"].default
            chosen = method(dropout=0.0) if "dropout" in method.model_fields else method()
            try:
                train(model, load_tokenizer("spectune-tiny"), chosen, rows, rows[:9], settings,
                      console=Console(quiet=True))  # fmt: skip
            except SpectuneError as error:
                found[name] = {"error": str(error)}
                continue
            if not place.leads:
                continue
            lines = (settings.output_dir / "metrics.jsonl").read_text().splitlines()  # type: ignore[operator]
            entries = [json.loads(line) for line in lines]
            state = {key: t.cpu() for key, t in attached(model)["default"].training_state_dict().items()}
            save_file(state, given.folder / f"same-{place.size}-{name}.safetensors")
            losses = [value for entry in entries for key, value in entry.items() if key.endswith("loss")]
            found[name] = {"losses": losses}
    if place.leads:
        (given.folder / f"same-{place.size}.json").write_text(json.dumps(found))


def run_short_of_memory(given: argparse.Namespace) -> None:
    """`spectune train` where the second process's device is taken by something else."""
    import torch

    from spectune.cli import main as spectune
    from spectune.torchrun import Place

    local = Place.from_environment().local_rank
    taken = []
    if local == 1:
        torch.cuda.set_device(1)
        free, _ = torch.cuda.mem_get_info(1)
        left = 3 * 2**30 if given.work == "oom" else 2 * 2**30
        taken.append(torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda:1"))
    sys.argv[1:] = ["train", "--model", str(given.folder / "base"), "--device", "cuda", "--dtype", "bfloat16"]
    sys.argv += ["--method", "full", "--output-dir", str(given.folder / given.work), "--set", "torch_compile=false"]
    sys.argv += ["--set", f"memory_check={'off' if given.work == 'oom' else 'refuse'}", "--set", "max_steps=20"]
    sys.argv += ["--set", "per_device_train_batch_size=512", "--set", "packing=false", "--set", "cuda_graphs=false"]
    sys.argv += ["--set", "gradient_checkpointing=false"]
    spectune()
    del taken


# -- what was found -------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def tail(text: str, lines: int) -> list[str]:
    return text.splitlines()[-lines:]


def page(entries: Sequence[dict[str, Any]]) -> str:
    lines = ["# Two devices against one", "", "Written by `benchmarks/two_devices.py`, which says what was run.", ""]
    for entry in entries:
        lines += [f"## {entry['part'].capitalize()}", "", f"Took {entry['took_seconds']} s.", ""]
        if "failed" in entry:
            lines += ["Failed:", "", "```", *entry["failed"], "```", ""]
        elif entry["part"] == "speed":
            lines += speed_lines(entry)
        elif entry["part"] == "same":
            lines += same_lines(entry["methods"])
        else:
            lines += command_lines(entry["commands"])
    return "\n".join(lines)


def speed_lines(entry: dict[str, Any]) -> list[str]:
    compiled = "compiled" if entry["compiled"] else "not compiled"
    what = f"{entry['shape']}, LoRA r16, {entry['rows']} x {entry['length']} tokens a device, {compiled}"
    lines = [f"{what}, {entry['device']}.", "", "| devices | tokens/s | ms a step | peak GB | first and last loss |"]
    lines.append("|---|---|---|---|---|")
    for devices, key in ((1, "one"), (2, "two")):
        found = entry[key]
        peak = "" if found["peak_gigabytes"] is None else f"{found['peak_gigabytes']:.1f}"
        losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
        speeds = f"{found['tokens_per_second']:,.0f} | {1000 * found['seconds_a_step']:,.1f}"
        lines.append(f"| {devices} | {speeds} | {peak} | {losses} |")
    verdict = "reached" if entry["ratio"] >= WANTED_RATIO else "NOT reached"
    return [*lines, "", f"{entry['ratio']:.3f} times one device ({WANTED_RATIO} wanted: {verdict}).", ""]


def same_lines(methods: dict[str, Any]) -> list[str]:
    lines = ["Largest difference from one device with the same rows a step, spectune-tiny's shape, float32.", ""]
    lines += ["| method | losses | weights | |", "|---|---|---|---|"]
    for name, found in methods.items():
        if "error" in found:
            lines.append(f"| {name} | {found['error']} | | FAILED |")
            continue
        good = found["loss"] <= TOLERANCE and found["weights"] <= TOLERANCE
        verdict = "same" if good else "NOT the same"
        lines.append(f"| {name} | {found['loss']:.1e} | {found['weights']:.1e} | {verdict} |")
    return [*lines, ""]


def command_lines(found: dict[str, Any]) -> list[str]:
    lines = ["| run | exit code | of its processes | validation loss | tokens/s | said |", "|---|---|---|---|---|---|"]
    for name, run in found.items():
        losses = " to ".join(f"{loss:.3f}" for loss in run["valid_loss"] if loss is not None)
        speeds = "" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}"
        said = "<br>".join([*run["said"], *run["warnings"]]).replace("|", "/")
        codes = ", ".join(run["exit_codes"])
        lines.append(f"| {name} | {run['exit_code']} | {codes} | {losses} | {speeds} | {said} |")
    for name, run in found.items():
        if "printed" in run:
            lines += ["", f"{name} printed last:", "", "```", *run["printed"], "```"]
    return [*lines, ""]


if __name__ == "__main__":
    main()
