"""How fast one base writes: bare, under one delta, and under many in one batch; ours beside PEFT and transformers.

    python -m benchmarks.decoding --out $OUT/decoding.jsonl                  # Llama-3-8B in bf16 on a CUDA device
    python -m benchmarks.decoding --out decoding.jsonl --small               # tiny, on the CPU
    python -m benchmarks.decoding --out $OUT/variants.jsonl --variants       # ours alone, compiled in several ways
    python -m benchmarks.decoding --out docs/results/decoding.jsonl --page docs/results/decoding.md

All systems are in one process, on models of the same shape with random weights, and are measured in turns, A-B-C-A-B-C:
a slow moment of the device meets all. What is timed is decoding: from a row's first new token to its last. Deltas are
not at their start (a product with zeros is faster), and none is merged.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.decoding_page import page
from benchmarks.shapes import CONFIGS, build
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import spectune
from spectune.blocks.recorded_steps import PlainSteps
from spectune.blocks.step_blocks import Compiling
from spectune.compute.evaluating import evaluating
from spectune.deltas import Attachment
from spectune.inference.engine import Engine
from spectune.inference.request import Request
from spectune.inference.step_choice import steps_for

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS = [f"lora{number}" for number in range(8)]
#: beside two of the LoRAs: sixteen deltas of seven methods
OTHERS: dict[str, spectune.Method] = {
    **{f"dora{n}": spectune.DoRA(r=16) for n in range(2)},
    **{f"adapter{n}": spectune.BottleneckAdapter(bottleneck_dim=64) for n in range(3)},
    **{f"bitfit{n}": spectune.BitFit() for n in range(2)},
    **{f"ia3{n}": spectune.IA3() for n in range(2)},
    **{f"prefix{n}": spectune.PrefixTuning(num_virtual_tokens=20) for n in range(2)},
    **{f"prompt{n}": spectune.PromptTuning(num_virtual_tokens=20) for n in range(3)},
}


@dataclass(frozen=True)
class Case:
    """What is written: `deltas` of a batch's rows."""

    name: str
    deltas: tuple[str | None, ...]

    @property
    def rows(self) -> int:
        return len(self.deltas)


CASES = (
    Case("bare, 1 row", (None,)),
    Case("bare, 16 rows", (None,) * 16),
    Case("one LoRA, 1 row", ("lora0",)),
    Case("one LoRA, 16 rows", ("lora0",) * 16),
    Case("8 LoRAs, 16 rows", tuple(LORAS) * 2),
    Case("16 deltas of 7 methods, 16 rows", ("lora0", "lora1", *OTHERS)),
)


@dataclass
class Setting:
    device: torch.device
    dtype: torch.dtype
    shape: str
    prompt: int = 64
    new: int = 48
    seconds: float = 290.0
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def model(self) -> Any:
        torch.manual_seed(0)
        return build(CONFIGS[self.shape](), self.device, self.dtype).eval().requires_grad_(False)

    def prompts(self, rows: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, 500, (rows, self.prompt), generator=generator).tolist()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class System:
    """Something that writes. `seconds(case)`: of its decoding; None where it cannot."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting

    def takes(self, case: Case) -> bool:
        return True

    def seconds(self, case: Case) -> float:
        raise NotImplementedError

    def warm(self, case: Case) -> None:
        self.seconds(case)

    def notes(self) -> dict[str, Any]:
        return {}


class Ours(System):
    """An engine, kept from one batch to the next as a server keeps it, on a base with deltas of all methods."""

    def __init__(
        self, name: str, setting: Setting, model: Any, compiling: Compiling | None, *, plain: bool = False
    ) -> None:  # fmt: skip
        super().__init__(name, setting)
        self.steps = list[Any]()
        made = steps_for(model, Attachment.of(model).family, 64, compiling=compiling)  # type: ignore[union-attr]

        def steps(batch: Any) -> Any:
            self.steps.append(PlainSteps(batch.run) if plain else made(batch))
            return self.steps[-1]

        self.engine = Engine(model, rows=16, steps=steps)

    def warm(self, case: Case) -> None:
        # deltas that come later make the tables larger: what was recorded before is recorded anew
        for _ in range(3):
            self.seconds(case)

    def seconds(self, case: Case) -> float:
        engine = self.engine
        with evaluating(engine.model):
            for prompt, delta in zip(self.setting.prompts(case.rows), case.deltas, strict=True):
                engine.submit(Request(prompt, self.setting.new, delta))
            _raise(engine.enter())
            self.setting.wait()
            begin = time.perf_counter()
            while not engine.idle:
                _raise(engine.advance())
            self.setting.wait()
            return time.perf_counter() - begin

    def notes(self) -> dict[str, Any]:
        return {"forms": [form.name for steps in self.steps for form in getattr(steps, "forms", [])[:1]]}


class Clock(StoppingCriteria):
    """Notes the times of the first and the last token, and stops nothing."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.count, self.times = setting, 0, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.count += 1
        if self.count in (1, self.setting.new):
            self.setting.wait()
            self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Generate(System):
    """`generate`, of transformers or through PEFT."""

    def __init__(self, name: str, setting: Setting, model: Any, **config: Any) -> None:
        super().__init__(name, setting)
        self.model, self.config = model, config

    def takes(self, case: Case) -> bool:
        return not any(case.deltas)

    def more(self, case: Case) -> dict[str, Any]:
        return {}

    def seconds(self, case: Case) -> float:
        setting, clock = self.setting, Clock(self.setting)
        ids = torch.tensor(setting.prompts(case.rows), device=setting.device)
        make: Any = GenerationConfig
        config = make(
            max_new_tokens=setting.new, min_new_tokens=setting.new, do_sample=False, pad_token_id=0, **self.config
        )
        with torch.no_grad():
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                stopping_criteria=StoppingCriteriaList([clock]), **self.more(case),
            )  # fmt: skip
        return clock.times[1] - clock.times[0]


class Peft(Generate):
    """One adapter for all rows, or PEFT's `adapter_names` for a mixed batch."""

    def takes(self, case: Case) -> bool:
        return all(delta in LORAS for delta in case.deltas)

    def warm(self, case: Case) -> None:
        if len(set(case.deltas)) == 1:
            super().warm(case)

    def more(self, case: Case) -> dict[str, Any]:
        if len(set(case.deltas)) > 1:
            return {"adapter_names": list(case.deltas)}
        self.model.set_adapter(case.deltas[0])
        return {}


class Continuous(System):
    """transformers' continuous batching, what `transformers serve --continuous-batching` runs."""

    def __init__(self, name: str, setting: Setting, model: Any) -> None:
        super().__init__(name, setting)
        self.model = model

    def takes(self, case: Case) -> bool:
        return not any(case.deltas)

    def seconds(self, case: Case) -> float:
        from transformers import ContinuousBatchingConfig

        make: Any = GenerationConfig
        new = self.setting.new
        config = make(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1)
        found = self.model.generate_batch(
            inputs=self.setting.prompts(case.rows), generation_config=config, record_timestamps=True,
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.3), progress_bar=False,
        )  # fmt: skip
        times = [output.timestamps for output in found.values()]
        if len(times) != case.rows or any(len(each) < new for each in times):
            raise RuntimeError(f"{len(times)} of {case.rows} rows, tokens {[len(each) for each in times]}")
        # rows enter together: from the last one's first token to the last token of all
        return max(each[-1] for each in times) - max(each[0] for each in times)


def _raise(written: Any) -> None:
    for one in written:
        if one.error is not None:
            raise one.error


def moved(model: Any) -> Any:
    """Every delta's weights away from their start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for delta in spectune.deltas.attached(model).values():
            for p in delta.parameters():
                p.add_(0.01 * torch.randn_like(p))
                p.requires_grad_(False)
    return model


def ours(setting: Setting) -> Any:
    """A model of ours with all deltas."""
    model = setting.model()
    for name in LORAS:
        spectune.attach(model, spectune.LoRA(r=16, lora_alpha=32, target_modules=TARGETS), name)
    for name, method in OTHERS.items():
        spectune.attach(model, method, name)
    return moved(model)


def peft(setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(setting.model(), config, adapter_name=LORAS[0], autocast_adapter_dtype=False)
    for name in LORAS[1:]:
        model.add_adapter(name, config)
    return model.eval().requires_grad_(False)


class Models:
    """Of each kind one, made when it is asked for first."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.made: dict[str, Any] = {}

    def __call__(self, kind: str, make: Callable[[Setting], Any]) -> Any:
        if kind not in self.made:
            self.made[kind] = make(self.setting)
        return self.made[kind]


def systems(setting: Setting) -> Iterator[Callable[[], System]]:
    """Each is made when it is measured first."""
    cuda = setting.device.type == "cuda"
    model = Models(setting)
    if cuda:
        yield lambda: Ours("ours, compiled", setting, model("ours", ours), Compiling())
        yield lambda: Ours("ours, recorded", setting, model("ours", ours), None)
    else:
        yield lambda: Ours("ours", setting, model("ours", ours), None, plain=True)
    yield lambda: Peft("PEFT", setting, model("peft", peft))
    yield lambda: Generate("transformers", setting, model("bare", Setting.model))
    if cuda:
        yield lambda: Generate(
            "transformers, static cache, compiled", setting, model("bare", Setting.model), cache_implementation="static"
        )
        yield lambda: Continuous("transformers, continuous batching", setting, model("paged", Setting.model))


def variants(setting: Setting) -> Iterator[Callable[[], System]]:
    """Ours, compiled in several ways."""
    model = Models(setting)
    for name, how in {
        "default": Compiling(),
        "nothing written out": Compiling(unrolled=8),
        "combined kernels": Compiling(combined=True),
        "tuned products": Compiling(tuned=True),
    }.items():
        yield lambda name=name, how=how: Ours(name, setting, model("ours", ours), how)  # type: ignore[misc]


@contextmanager
def noted(line: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        line["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else repr(error)


def kernels(system: System, case: Case) -> dict[str, Any]:
    """Kernels of a step, their time, and those that take most of it, as the profiler counts them over one batch."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        system.seconds(case)
    events = [event for event in found.events() if "cuda" in str(event.device_type).lower()]
    busy = sum(event.time_range.elapsed_us() for event in events)
    steps = system.setting.new
    names = Counter[str]()
    for event in events:
        names[event.name] += event.time_range.elapsed_us()
    counts = Counter(event.name for event in events)
    most = [
        {"name": name[:120], "us_a_step": round(us / steps, 1), "a_step": round(counts[name] / steps, 1)}
        for name, us in names.most_common(30)
    ]
    return {"kernels_a_step": len(events) / steps, "busy_ms_a_step": busy / 1e3 / steps, "kernels": most}


def measure(setting: Setting, out: Path, repeats: int, makes: Iterator[Callable[[], System]], cases: Any) -> None:
    """Warm each up once, then measure all in turns."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    ready: list[System] = []
    for make in makes:
        began = time.monotonic()
        with noted({}):
            ready.append(make())
            # twice: see `Ours.warm`
            chosen = [case for case in cases if ready[-1].takes(case)]
            for case in chosen * (2 if isinstance(ready[-1], Ours) else 1):
                line = lines[ready[-1].name, case.name] = {
                    "system": ready[-1].name, "case": case.name, "rows": case.rows, "seconds": [],
                }  # fmt: skip
                if setting.left < 15:
                    line["failed"] = "no time was left"
                    continue
                warm = time.monotonic()
                with noted(line):
                    ready[-1].warm(case)
                line["warm_up_seconds"] = time.monotonic() - warm
            print(f"{ready[-1].name}: ready after {time.monotonic() - began:.0f} s", flush=True)
    for _ in range(repeats):
        for case in cases:
            for system in ready:
                line = lines.get((system.name, case.name), {"failed": ""})
                # PEFT's mixed batches take half a minute
                again = not line.get("seconds") or line["seconds"][0] < 10
                if "failed" not in line and setting.left > 3 and again:
                    with noted(line):
                        line["seconds"].append(system.seconds(case))
        written(lines, setting, out)
    for system in ready:
        for case in filter(system.takes, cases):
            line = lines[system.name, case.name]
            if setting.device.type == "cuda" and isinstance(system, Ours) and "failed" not in line and setting.left > 3:
                with noted({}):
                    line |= kernels(system, case)
            line |= system.notes()
    written(lines, setting, out, last=True)


def written(lines: dict[tuple[str, str], dict[str, Any]], setting: Setting, out: Path, *, last: bool = False) -> None:
    import peft
    import transformers

    device = torch.cuda.get_device_name() if setting.device.type == "cuda" else "CPU"
    about = {"device": device, "shape": setting.shape, "dtype": str(setting.dtype).removeprefix("torch."),
             "prompt": setting.prompt, "new": setting.new, "torch": torch.__version__,
             "transformers": transformers.__version__, "peft": peft.__version__}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for line in lines.values():
            if line["seconds"]:
                tokens = line["rows"] * (setting.new - 1)
                line["tokens_per_second"] = statistics.median(tokens / seconds for seconds in line["seconds"])
            file.write(json.dumps({**about, **line}) + "\n")
    for line in lines.values() if last else ():
        rate = line.get("tokens_per_second")
        print(f"{line['case']:<34} {line['system']:<38} "
                  + (f"{rate:9,.1f} tokens/s" if rate else f"FAILED: {line.get('failed', 'no time was left')}")
                  + (f", {line['kernels_a_step']:.0f} kernels a step, busy {line['busy_ms_a_step']:.2f} ms"
                     if "kernels_a_step" in line else ""))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines")
    add("--shape", default="Llama-3-8B", help=f"one of {', '.join(CONFIGS)}")
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=290, help="of the whole; what is not measured by then is left out")
    add("--cases", default="", help="only cases whose name has this in it")
    add("--small", action="store_true", help="a tiny shape on the CPU")
    add("--variants", action="store_true", help="instead: ours, compiled in several ways")
    add("--systems", type=int, nargs="*", help="only these, by number")
    add("--page", type=Path, help="write the page from --out; measures nothing")
    add("--note", default="", help="a paragraph at the end of the page")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    logging.getLogger("spectune").setLevel(logging.DEBUG)
    if args.page:
        lines = [json.loads(line) for line in args.out.read_text("utf-8").splitlines()]
        args.page.write_text(page(lines, args.note), encoding="utf-8")
        return 0
    cuda = not args.small
    setting = Setting(
        torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32,
        args.shape if cuda else "tiny llama", new=48 if cuda else 16, seconds=args.seconds,
    )  # fmt: skip
    cases = [case for case in CASES if args.cases in case.name]
    makes = variants(setting) if args.variants else systems(setting)
    if args.systems:
        makes = (make for number, make in enumerate(makes) if number in args.systems)
    measure(setting, args.out, args.repeats, makes, cases)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
