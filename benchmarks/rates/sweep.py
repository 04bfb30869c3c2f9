"""The best learning rate of every method on every base: from the rule's default three times up and down, further where
the best lies on an edge, then half as far around the best.

Several processes share one device, each with one base at a time. Every finished run is a line of the results at once,
and a later call goes on from these lines."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: half steps of the grid: neighbours are this far apart
RATIO = math.sqrt(3)
#: runs of one method on one base at most
MOST = 9
MAX_LENGTH = 256


@dataclass
class Arm:
    """One method on one base. Rates are `centre * RATIO ** k`; `losses` is k -> loss, infinite where it diverged."""

    base: str
    method: str
    centre: float
    losses: dict[int, float] = field(default_factory=dict)
    flying: set[int] = field(default_factory=set)

    def rate(self, k: int) -> float:
        return float(f"{self.centre * RATIO**k:.3g}")

    def wanted(self) -> int | None:
        """The next to try; None where nothing is left, or all that is running must end first."""
        known = set(self.losses) | self.flying
        if first := [k for k in (0, 2, -2) if k not in known]:
            return first[0]
        if (self.flying and len(self.losses) < 3) or len(known) >= MOST:
            return None
        best = min(self.losses, key=lambda k: self.losses[k])
        if math.isinf(self.losses[best]):
            return self._new(min(known) - 2)
        for edge, beyond in ((max(known), 2), (min(known), -2)):
            if best == edge:
                return self._new(best + beyond)
        return next((k for k in (best + 1, best - 1) if k not in known), None)

    def _new(self, k: int) -> int | None:
        return None if k in self.flying else k


@dataclass(frozen=True)
class Setting:
    """What all runs share: `folders` is base -> what `spectune.load` takes."""

    material: Path
    folders: dict[str, str]
    steps: int
    batch: int
    threads: int


def sweep(arms: list[Arm], setting: Setting, out: Path, workers: int, seconds: float) -> None:
    """Run until nothing is wanted or the time is over."""
    context = multiprocessing.get_context("spawn")
    end, bases = time.monotonic() + seconds, list(dict.fromkeys(arm.base for arm in arms))
    pipes: dict[Connection, tuple[Any, str]] = {}
    flying: dict[Connection, tuple[Arm, int]] = {}
    for number in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, setting), daemon=True)
        process.start()
        theirs.close()
        pipes[ours] = (process, bases[number % len(bases)])
    try:
        idle = list(pipes)
        while True:
            now = time.monotonic()
            for pipe in list(idle):
                if now > end or (job := _next_job(arms, pipes[pipe][1])) is None:
                    continue
                arm, k = job
                pipes[pipe] = (pipes[pipe][0], arm.base)
                arm.flying.add(k)
                flying[pipe] = job
                pipe.send((arm.base, arm.method, arm.rate(k)))
                idle.remove(pipe)
            if not flying:
                break
            for ready in wait(list(flying), timeout=max(1.0, end + 30 - now)):
                assert isinstance(ready, Connection)
                arm, k = flying.pop(ready)
                arm.flying.discard(k)
                try:
                    record = ready.recv()
                except EOFError:
                    print(f"a worker ended in {arm.base} {arm.method} {arm.rate(k):g}", flush=True)
                    continue
                arm.losses[k] = math.inf if record["valid_loss"] is None else record["valid_loss"]
                _write(out, {**record, "centre": arm.centre, "k": k})
                idle.append(ready)
            if time.monotonic() > end + 30:
                break
    finally:
        for process, _ in pipes.values():
            process.terminate()


def _next_job(arms: list[Arm], base: str) -> tuple[Arm, int] | None:
    """The arm with the fewest runs among those of `base`, else of the base on which most is left."""
    open_arms = [(arm, k) for arm in arms if (k := arm.wanted()) is not None]
    if not open_arms:
        return None
    here = [job for job in open_arms if job[0].base == base]
    if not here:
        most = Counter(arm.base for arm, _ in open_arms).most_common(1)[0][0]
        here = [job for job in open_arms if job[0].base == most]
    return min(here, key=lambda job: len(job[0].losses) + len(job[0].flying))


def resumed(arms: Iterator[Arm], out: Path, steps: int) -> list[Arm]:
    """The arms with what the results hold of them already."""
    found = list(arms)
    by_key = {(arm.base, arm.method): arm for arm in found}
    for record in records(out):
        arm = by_key.get((record.get("base"), record.get("method")))
        if record["kind"] == "run" and arm is not None and record["steps"] == steps:
            arm.centre = record["centre"]
            arm.losses[record["k"]] = math.inf if record["valid_loss"] is None else record["valid_loss"]
    return found


def records(out: Path) -> list[dict[str, Any]]:
    """All lines of the results; none where there is no file."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []


def _write(out: Path, record: dict[str, Any]) -> None:
    loss = "diverged" if record["valid_loss"] is None else f"{record['valid_loss']:.4f}"
    print(f"{record['base']} {record['method']} {record['rate']:g}: {loss} ({record['seconds']} s)", flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _work(pipe: Connection, setting: Setting) -> None:
    import torch
    from rich.console import Console

    import spectune
    from spectune.data import encode, load_rows
    from spectune.errors import DivergedError
    from spectune.methods import method_from_name

    torch.set_num_threads(setting.threads)
    cuda = torch.cuda.is_available()
    where: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"} if cuda else {"device": "cpu"}
    held, base_loss = "", None
    model: Any
    tokenizer: Any
    while True:
        base, name, rate = pipe.recv()
        if base != held:
            model = None
            model, tokenizer = spectune.load(setting.folders[base], **where)
            read = [load_rows(setting.material / f"{part}.jsonl") for part in ("train", "valid")]
            train, valid = (encode(part, tokenizer, max_length=MAX_LENGTH, separator="\n") for part in read)
            held, base_loss = base, None
        method = method_from_name(name)
        config = spectune.TrainingConfig(
            learning_rate=rate, max_steps=setting.steps, eval_steps=setting.steps, logging_steps=setting.steps,
            per_device_train_batch_size=setting.batch, per_device_eval_batch_size=setting.batch,
            max_length=MAX_LENGTH, separator="\n", load_best_at_end=False, memory_check="off", torch_compile=False,
            cuda_graphs=False, packing=False, gradient_checkpointing=False,
        )  # fmt: skip
        begin, loss = time.perf_counter(), None
        delta = spectune.attach(model, method, "run", tokenizer=tokenizer, keep_base=method.trains_base)
        try:
            quiet = Console(file=io.StringIO())
            result = spectune.train(
                model, tokenizer, delta, train, valid, config, console=quiet, base_valid_loss=base_loss
            )
            base_loss, loss = result.base_valid_loss, result.valid_loss
        except DivergedError:
            pass
        finally:
            spectune.detach(model, "run")
        record = {
            "kind": "run", "base": base, "method": name, "rate": rate, "valid_loss": loss, "base_loss": base_loss,
            "steps": setting.steps, "batch": setting.batch, "device": "cuda" if cuda else "cpu",
            "seconds": round(time.perf_counter() - begin, 1),
        }  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            pipe.send(record)
