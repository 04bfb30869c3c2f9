"""Many deltas on one base: attaching the 1,000th, what 1,000 of them cost the bare base, and how long a delta takes
from disk and from host memory.

    PYTHONPATH=src python benchmarks/banks.py --out banks.jsonl --base ../bases/gpt2-27m --page docs/results/banks.md

One JSON line for each figure, behind those that the file has. Times of passes are of the processor (one thread,
`time.thread_time`): what else runs on the machine then matters less; times of loading are of the clock. The two bases
that are compared take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import spectune
from spectune.deltas import attach, detach

METHODS = {
    "lora": spectune.LoRA(r=8),
    "dora": spectune.method_from_name("dora"),
    "adapter": spectune.BottleneckAdapter(),
    "bitfit": spectune.BitFit(),
    "ia3": spectune.method_from_name("ia3"),
    "ln": spectune.method_from_name("ln"),
    "prefix": spectune.PrefixTuning(),
    "prompt": spectune.PromptTuning(),
}


def tiny_llama(layers: int) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=256)).eval()


def timed(what: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    before = clock()
    what()
    return clock() - before


def middle(times: list[float]) -> float:
    """Milliseconds."""
    return round(1e3 * statistics.median(times), 3)


def attaching(count: int, layers: int) -> Iterator[dict[str, Any]]:
    """Attach `count` LoRAs, and compare bare passes with those of a model that has none."""
    without, with_all = tiny_llama(layers), tiny_llama(layers)
    times: list[float] = []
    at = [number for number in (1, 32, count) if number <= count]
    for number in range(count):
        times.append(timed(lambda n=number: attach(with_all, spectune.LoRA(r=8), f"d{n}")))
        if number + 1 in at and number:
            yield {"what": "attach", "number": number + 1, "ms": middle(times[-5:])}
        if number + 1 in (1, count):
            for rows, length in ((16, 32), (1, 8)):
                ids = torch.randint(0, 256, (rows, length))
                yield {"what": "bare pass", "attached": number + 1, "rows": rows, "length": length,
                       **compared(without, with_all, ids)}  # fmt: skip
    yield {"what": "detach", "ms": middle([timed(lambda n=n: detach(with_all, f"d{n}")) for n in range(min(count, 9))])}


def compared(without: PreTrainedModel, with_all: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    found: list[tuple[float, float]] = []
    with spectune.route(with_all, None), torch.no_grad():
        for model in (without, with_all):
            model(ids)
        for _ in range(40):
            found.append(tuple(timed(lambda m=m: m(ids), time.thread_time) for m in (without, with_all)))  # type: ignore[arg-type]
    none, all_of_them = zip(*found, strict=True)
    return {"none_ms": middle(list(none)), "ms": middle(list(all_of_them)),
            "ratio": round(statistics.median(b / a for a, b in found), 4)}  # fmt: skip


def write_deltas(model: PreTrainedModel, root: Path) -> None:
    for name, method in METHODS.items():
        delta = attach(model, method, name)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        delta.save(root / name)
        detach(model, name)


def loaded(base: str, device: str) -> PreTrainedModel:
    """A base by name, or "8b": the shape of Llama-3-8B in bfloat16, with weights of no sense."""
    if base != "8b":
        model, _ = spectune.load(base, device=device)
        return model
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256, dtype="bfloat16")  # fmt: skip
    with torch.device(device):
        made: PreTrainedModel = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return made


def loading(base: str, device: str, times: int) -> Iterator[dict[str, Any]]:
    """Each method's delta from disk for the first time, again, and back from host memory."""
    model = loaded(base, device)
    name = Path(base).name
    with tempfile.TemporaryDirectory() as folder:
        write_deltas(model, Path(folder))
        answer(model)
        began = time.perf_counter()
        bank = spectune.Bank(model, folder)
        yield {"what": "bank", "base": name, "device": device, "ms": middle([time.perf_counter() - began])}
        sizes = {}
        for method in METHODS:
            before = bank.device_bytes
            turns = [from_disk(bank, method) for _ in range(times + 1)]
            with bank.hold([method]):
                sizes[method] = bank.device_bytes - before
            bank.forget(method)
            later = {f"{key}_ms": middle([turn[key] for turn in turns[1:]]) for key in turns[0]}
            yield {"what": "load", "base": name, "device": device, "method": method, "bytes": sizes[method],
                   "first_ms": middle([turns[0]["prepare"] + turns[0]["put_on"]]), **later}  # fmt: skip
        bank.close()
        back = from_host(model, folder, max(sizes.values()), times)
        yield {"what": "back from host", "base": name, "device": device, **back}


def answer(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64, device=model.device)).logits.sum().item()


def from_disk(bank: spectune.Bank, name: str) -> dict[str, float]:
    found = {"prepare": timed(lambda: bank.prepare(name))}
    began = time.perf_counter()
    with bank.route(name):
        found["put_on"] = time.perf_counter() - began
        found["first_pass"] = timed(lambda: answer(bank.model))
        found["warm_pass"] = timed(lambda: answer(bank.model))
    bank.forget(name)
    return found


def from_host(model: PreTrainedModel, folder: str, room: int, times: int) -> dict[str, float]:
    """Milliseconds that each method's delta takes to come back, what leaves for it included."""
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    with spectune.Bank(model, folder, device_memory=room) as bank:
        for turn in range(times + 1):
            for name, seconds in found.items():
                began = time.perf_counter()
                with bank.route(name):
                    if turn:
                        seconds.append(time.perf_counter() - began)
        assert bank.loads == len(METHODS), "each was read once"
    return {f"{name}_ms": middle(seconds) for name, seconds in found.items()}


def many(count: int, layers: int) -> Iterator[dict[str, Any]]:
    """A folder of `count` LoRAs, of which 64 fit on the device: names are wanted in turn."""
    model = tiny_llama(layers)
    with tempfile.TemporaryDirectory() as folder:
        attach(model, spectune.LoRA(r=8), "d0").save(Path(folder, "d0"))
        detach(model, "d0")
        for number in range(1, count):
            shutil.copytree(Path(folder, "d0"), Path(folder, f"d{number}"))
        with spectune.Bank(model, folder) as one, one.hold(["d0"]):
            room = 64 * one.device_bytes
        with spectune.Bank(model, folder, device_memory=room) as bank:
            listing = middle([timed(bank.names)])
            for turn in ("from disk", "from host memory"):
                times = []
                for number in range(count):
                    began = time.perf_counter()
                    with bank.route(f"d{number}"):
                        times.append(time.perf_counter() - began)
                yield {"what": "many", "deltas": count, "turn": turn, "names_ms": listing, "ms": middle(times),
                       "slowest_tenth_ms": round(1e3 * sorted(times)[-count // 10], 3),
                       "on_device": len(bank.on_device())}  # fmt: skip


def page(found: list[dict[str, Any]], machine: str) -> str:
    """docs/results/banks.md."""
    of = lambda what: [line for line in found if line["what"] == what]  # noqa: E731
    lines = ["# Many deltas on one base", "", f"Made by `benchmarks/banks.py --page`. Measured on {machine}.", ""]
    lines += ["## Attached at once", "", "LoRA of rank 8 at all linears of a Llama of 32 layers, 64 wide. A bare pass "
              "is under `route(model, None)`, beside the same model with nothing attached, in turns; processor time, "
              "one thread.", "", "| | |", "| - | -: |"]  # fmt: skip
    lines += [f"| attaching number {line['number']:,} | {line['ms']:.0f} ms |" for line in of("attach")]
    lines += [f"| detaching one of them | {line['ms']:.0f} ms |" for line in of("detach")]
    lines += [f"| bare pass, {line['rows']} x {line['length']} tokens, {line['attached']:,} attached | "
              f"{line['ratio']:.3f} of one with none |" for line in of("bare pass")]  # fmt: skip
    lines += [""]
    for line in of("many"):
        slow = f"a tenth took over {line['slowest_tenth_ms']:.1f} ms"
        lines += [f"A bank of {line['deltas']:,} such folders, {line['on_device']} of which fit on the device: each "
                  f"{line['turn']} in {line['ms']:.1f} ms ({slow}).", ""]  # fmt: skip
    for base in dict.fromkeys((line["base"], line["device"]) for line in of("load")):
        here = [line for line in of("load") if (line["base"], line["device"]) == base]
        back = next(line for line in of("back from host") if (line["base"], line["device"]) == base)
        lines += [f"## {base[0]}, {base[1]}", "", "Milliseconds of the clock. `first`: the first of its method since "
                  "the bank was made, proofs included. `from disk`: read, checked and put on. `back`: from host "
                  "memory, another one leaving for it.", "",
                  "| method | KiB | first | from disk | of which on the model | back | first pass | next pass |",
                  "| - | -: | -: | -: | -: | -: | -: | -: |"]  # fmt: skip
        for line in here:
            method, disk = line["method"], line["prepare_ms"] + line["put_on_ms"]
            times = [line["first_ms"], disk, line["put_on_ms"], back[f"{method}_ms"], line["first_pass_ms"],
                     line["warm_pass_ms"]]  # fmt: skip
            lines += [f"| {method} | {line['bytes'] / 1024:,.0f} | " + " | ".join(f"{t:.1f}" for t in times) + " |"]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="spectune-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument(
        "--parts", nargs="*", default=["load", "many", "attach"], help="what is measured; none: nothing"
    )
    parser.add_argument("--page", type=Path, help="write a page of all that --out holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "load": lambda: loading(args.base, args.device, args.times),
        "many": lambda: many(args.count, args.layers),
        "attach": lambda: attaching(args.count, args.layers),
    }
    with args.out.open("a") as file:
        for part in args.parts:
            for line in parts[part]():
                print(line, flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()
    if args.page:
        found = [json.loads(line) for line in args.out.read_text().splitlines()]
        processor = platform.processor() or platform.machine()
        args.page.write_text(
            page(found, f"{processor}, torch {torch.__version__}, transformers {transformers.__version__}") + "\n"
        )


if __name__ == "__main__":
    main()
