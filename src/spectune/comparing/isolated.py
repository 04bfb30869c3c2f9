"""Memory of training in a process of its own: no other run's leftovers, no cache of another's allocator.

The parent hands the job as JSON to `python -m spectune.comparing.isolated` and gets the peaks back as JSON. The child
runs the real loop for a few steps, executed as the run's are, each of them on the batch with the longest rows: from the
second on the optimizer's state is there as well, so this is the peak of a long run.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spectune import errors
from spectune.blocks.cuda_graphs import BEFORE_CAPTURE
from spectune.blocks.execution import Execution
from spectune.data import DataReport, Encoded, Labels, Row, load_rows
from spectune.deltas import Method, attach
from spectune.errors import OutOfMemoryError, SpectuneError, first_line, is_out_of_memory
from spectune.files.metadata import json_object
from spectune.methods import method_from_dict
from spectune.storage import load
from spectune.training import TrainingConfig
from spectune.training.decisions import decide_run
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.loop import Loop
from spectune.training.prepare import Prepared, prepare
from spectune.training.run_state import RunState
from spectune.training.step_batches import Batches

#: optimizer steps; in the second the optimizer's state is there
STEPS = 2


def train_memory_in_own_process(job: Mapping[str, Any]) -> dict[str, int]:
    """Peak memory in bytes of training with this method, by phase and kind as in `RunResult.peak_memory_bytes`.

    Phases: `train`, steps on the batch with the longest rows; `valid`, its longest rows in one batch of validation.
    `resident` and, on CUDA, all kinds are those of the new process alone; what this one holds of the device is not in
    them, but has to fit beside them.

    Args:
        job: from `memory_job`.

    Raises:
        SpectuneError: what the child raised, of the same class; OutOfMemoryError also where the system killed it.
    """
    # the child imports the same spectune as this process, installed or not
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        # -P: a module is not looked for in the working directory, which may be a stranger's
        [sys.executable, "-P", "-m", "spectune.comparing.isolated"], input=json.dumps(job), env=environment,
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    doing = f"measuring the memory of {method_from_dict(job['method']).label} in a process of its own"
    try:
        answer = json_object(done.stdout.encode("utf-8", "replace"), "its answer")
    except ValueError:
        if done.returncode == -9:
            raise OutOfMemoryError(f"{doing}: the system killed it, most likely for want of memory") from None
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise SpectuneError(f"{doing}: it ended with exit code {done.returncode}: {last}") from None
    if "error" in answer:
        raise _error(answer["error"], f"{doing}: {answer['message']}")
    return {str(key): int(size) for key, size in answer["peak_memory_bytes"].items()}


def memory_job(
    base: Mapping[str, Any], method: Method, config: TrainingConfig, train_rows: str | Path | Sequence[Row], *,
    labels: Labels | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the child reads, as JSON.

    Args:
        base: arguments of `spectune.load`, its name among them.
        config: "auto" recomputes nothing here.
        train_rows: a path, or rows.
        labels: of the base's head; None of a language model.
    """
    fields = ("origin", "prompt", "completion", "text", "messages", "history", "unlearned", "tools", "documents",
              "template_kwargs", "label", "choices", "tokens", "tags")  # fmt: skip
    rows: Any = train_rows
    if not isinstance(train_rows, str | Path):
        rows = [{key: getattr(row, key) for key in fields} for row in train_rows]
    return {
        "base": dict(base),
        "labels": None if labels is None else dataclasses.asdict(labels),
        "method": method.model_dump(mode="json"),
        "config": config.model_dump(mode="json", exclude={"output_dir", "resume"}),
        "rows": rows if isinstance(rows, list) else str(rows),
    }


def _error(name: str, message: str) -> SpectuneError:
    """The error of that class, out of `spectune.errors`; SpectuneError itself where there is none of that name."""
    kinds = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}
    kind = kinds.get(name, SpectuneError)
    return kind(message) if issubclass(kind, SpectuneError) else SpectuneError(message)


def _measure(job: dict[str, Any]) -> dict[str, int]:
    """The child's work: the run's own steps, executed as the run's are."""
    config, method = TrainingConfig(**job["config"]), method_from_dict(job["method"])
    source = job["rows"] if isinstance(job["rows"], str) else [Row(**row) for row in job["rows"]]
    rows = load_rows(source, **config.row_options)
    given = job.get("labels")
    head = {} if given is None else Labels(given["task_type"], tuple(given["names"])).load_options
    model, tokenizer = load(**job["base"], **head)
    torch.manual_seed(config.seed)
    delta = attach(model, method, "memory", tokenizer=tokenizer, seed=config.seed)
    prepared = prepare(model, tokenizer, method, rows, rows, config, delta.base_fingerprint)
    execution = decide_run(delta, prepared)
    run = RunState.of(delta, _of_longest_rows(prepared, execution), execution.packing, World())
    with Display(Console(quiet=True), method.label, run.total_steps, 0) as display:
        Loop(run, execution).drive(display)
    return run.progress.peak_memory_bytes


def _of_longest_rows(prepared: Prepared, execution: Execution) -> Prepared:
    """A run all of whose steps are its first one, which holds the longest row, validated on its longest rows."""
    examples, config = prepared.examples, prepared.config
    [first, *_] = Batches(examples, config, execution.packing, World()).windows(0)
    by_length = sorted(examples, key=lambda example: -example.length)
    parts = [examples[row] for batch in first for row in batch], by_length[: config.per_device_eval_batch_size]
    # until blocks are traced, captured and replayed
    steps = STEPS + (BEFORE_CAPTURE if execution.graphs else 0)
    changes = {"max_steps": steps, "eval_steps": None, "save_steps": None, "early_stopping_patience": None}
    train, valid = (Encoded(part, DataReport()) for part in parts)
    return replace(prepared, config=config.model_copy(update=changes), encoded=(train, valid))


def _main() -> None:
    # stdout is for the answer alone, whatever libraries print
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer: dict[str, Any] = {"peak_memory_bytes": _measure(json.load(sys.stdin))}
        except SpectuneError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # whatever it is, the parent has to be told
            kind = OutOfMemoryError if is_out_of_memory(error) else SpectuneError
            answer = {"error": kind.__name__, "message": f"{type(error).__name__}: {first_line(error)}"}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()
