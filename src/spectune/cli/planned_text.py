"""What `spectune plan` prints: the table, what "auto" came to, and the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectune.cli.console import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from spectune.blocks.execution import Execution
    from spectune.deltas import Method
    from spectune.planning import Estimate
    from spectune.training import TrainingConfig


@dataclass(frozen=True)
class Arm:
    """A method with the plan of its run.

    Attributes:
        estimate: of its longest batch as it is padded, by which it is decided what fits.
        memory: terms and peaks as the run predicts them of its first steps, packed where rows are packed.
    """

    method: Method
    execution: Execution
    estimate: Estimate
    memory: dict[str, int]

    def entry(self, model: str, limit: int | None, *, named: bool) -> dict[str, Any]:
        """For JSON. `named`: what would fit is worked out where it does not."""
        found = {**self.estimate.to_dict(), **self.memory, "model": model, "label": self.method.label, "fits": None,
                 "torch_compile": self.execution.compiled}  # fmt: skip
        if limit is not None:
            found["fits"] = self.estimate.fits(limit)
            if not found["fits"] and named:
                found["largest_batch"] = self.estimate.largest_batch(limit)
                found["largest_length"] = self.estimate.largest_length(limit)
                found["advice"] = f"{self.estimate.advice(limit)} {self.estimate.most(limit)}"
        return found


def decisions(config: TrainingConfig, arms: Sequence[Arm], steps: int | None, device: str) -> list[str]:
    """Lines on what "auto" came to, and why."""
    compiled = [arm.method.name for arm in arms if arm.execution.compiled]
    lines = []
    if config.torch_compile == "auto":
        if steps is None:
            lines.append(
                "torch_compile=auto: blocks are planned without the compiler, as nothing says how long the run is. "
                "--data or --set max_steps=N says it, --set torch_compile=true plans compiled blocks"
            )
        elif len(compiled) in (0, len(arms)):
            lines.append(f"torch_compile=auto: {str(bool(compiled)).lower()}, for a run of {steps:,} steps")
        else:
            some = f"true for {', '.join(compiled)}, false for the others"
            lines.append(f"torch_compile=auto: {some}, in a run of {steps:,} steps")
    if compiled and device == "cpu":
        first = "on a CPU the first steps, which hold the longest batch"
        lines.append(f"{first}, run without the compiler: they are planned")
    if captured := [arm.method.name for arm in arms if arm.estimate.cuda_graphs]:
        lines.append(
            f"cuda_graphs={str(config.cuda_graphs).lower()}: blocks are recorded for {', '.join(captured)}. Planned is "
            "what the recordings of one shape of a batch keep; each further shape that comes back keeps its own"
        )
    reasons = dict.fromkeys(arm.execution.reason("packing") for arm in arms)
    return [*lines, *(f"packing={str(config.packing).lower()}: {reason}" for reason in reasons if reason is not None)]


def print_plan(out: Console, answer: dict[str, Any], estimates: list[Estimate]) -> None:
    from rich.table import Column, Table

    from spectune.planning.estimate import shown
    from spectune.planning.trace import TERMS

    if estimates:
        first = estimates[0]
        title = f"{answer['model']}, {first.batch} rows of {first.length} tokens, {first.dtype} on {answer['device']}"
        title += f", base in {first.base_precision}" if first.base_precision is not None else ""
        recomputes = ["checkpointing"] if any(estimate.gradient_checkpointing for estimate in estimates) else []
        compiles = ["compiled"] if any(entry["torch_compile"] for entry in answer["methods"]) else []
        numbers = [Column(name, justify="right") for name in ("trainable", "share", *TERMS, "peak", "reserved")]
        fits = "fits" if answer["memory"] is None else f"fits {shown(answer['memory'])}"
        table = Table("method", *recomputes, *compiles, *numbers, "at the peak", fits, title=title)
        yes_or_no, modes = {None: "?", True: "yes", False: "no"}, {True: "every block", False: "none"}
        for estimate, entry in zip(estimates, answer["methods"], strict=True):
            share = estimate.trainable_parameters / estimate.total_parameters
            sizes = [entry[name] for name in (*TERMS, "peak_allocated", "peak_reserved")]
            mode = estimate.gradient_checkpointing
            table.add_row(
                estimate.method, *(mode if isinstance(mode, str) else modes[mode] for _ in recomputes),
                *(yes_or_no[bool(entry["torch_compile"])] for _ in compiles), f"{estimate.trainable_parameters:,}",
                f"{100 * share:.3g}%", *map(shown, sizes), estimate.peak_moment.name, yes_or_no[entry["fits"]],
            )  # fmt: skip
        out.print(table)
        if first.context:
            note(f"reserved leaves out what the process takes of a CUDA device by itself, about {shown(first.context)}")
        if any(entry["peak_allocated"] < estimate.peak_allocated
               for estimate, entry in zip(estimates, answer["methods"], strict=True)):  # fmt: skip
            note("peak and reserved are those of the first steps as the run executes them; terms, and what fits, are "
                 f"by the longest batch as it is padded, {shown(max(e.peak_reserved for e in estimates))}")  # fmt: skip
        if any(estimate.host for estimate in estimates):
            note(f"offload takes up to {shown(max(e.host for e in estimates))} of host memory for blocks' inputs")
        if first.validation is not None and any((e.validation or 0) > e.peak_reserved for e in estimates):
            note(f"validation takes up to {shown(max(e.validation or 0 for e in estimates))}, more than training: "
                 "per_device_eval_batch_size")  # fmt: skip
    for refusal in answer["refused"]:
        note(f"{refusal['method']}: {refusal['reason']}")
    if (data := answer.get("data")) is not None:
        note(f"data: {data['source']}: {data['rows']:,} rows to train on, {data['held_out']:,} to validate; the "
             f"longest has {data['longest_row_tokens']:,} tokens; {data['tokens']:,} tokens and "
             f"{data['steps_per_epoch']:,} steps an epoch")  # fmt: skip
        if data["mixture"]:
            note(f"  {data['mixture']}")
        for name, flops in data["flops_per_epoch"].items():
            note(f"  {name}: {flops / 1e12:,.3g} TFLOP an epoch")
    for timed in answer.get("calibration", ()):
        note(f"{timed['method']}: {timed['seconds_per_epoch']:,.1f} s an epoch without validation, by "
             f"{timed['timed_steps']} steps here on {timed['device']} in {timed['dtype']} "
             f"({timed['tokens_per_second']:,.0f} tokens/s)")  # fmt: skip
