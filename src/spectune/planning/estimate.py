"""What a plan says: bytes by term, the peak, whether it fits, and what to change if not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spectune.blocks.recompute import ORDER, Recomputation
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.skeleton import FEW
from spectune.planning.trace import TERMS, Moment
from spectune.sizes import bytes_of

#: what a process holds of a CUDA device beside torch's allocator: the driver's context, kernels, handles
CUDA_CONTEXT = 600 * 2**20
#: the largest batch and length that are looked for
_MOST_ROWS = 2**16
_MOST_TOKENS = 2**20


@dataclass(frozen=True)
class Question:
    """What an estimate answers, and can answer again for batches of other sizes.

    Attributes:
        validation: a validation batch, or rows of one that is as long as training's; None leaves it out.
    """

    planner: Planner
    shape: Shape
    validation: int | Shape | None = None

    def answer(self) -> Estimate:
        """The plan of the batch."""
        planner, shape, workload = self.planner, self.shape, self.planner.workload
        step, validation = planner.step(shape), self._validation(shape)
        built, whole = planner.built, planner.built.whole
        return Estimate(
            model=workload.name,
            method=workload.method.name,
            batch=shape.rows,
            length=shape.length,
            dtype=str(workload.dtype).removeprefix("torch."),
            base_precision=workload.base_precision,
            device=workload.device,
            gradient_checkpointing=planner.execution.recomputation,
            optim=workload.optim,
            torch_compile=planner.execution.compiled,
            cuda_graphs=planner.execution.graphs,
            recordings=planner.graph_buffers(shape),
            trainable_parameters=sum(parameter.numel() for parameter in whole.trained),
            total_parameters=whole.family.num_parameters,
            base_weights=whole.base,
            **step.largest,
            peak_allocated=step.peak_allocated,
            peak_reserved=step.peak_reserved,
            context=CUDA_CONTEXT if workload.device == "cuda" else 0,
            host=built.host_bytes,
            validation=validation,
            moments=step.moments,
            source="trace" if built.repeats or whole.depth <= FEW else "full trace",
            question=self,
        )

    def peaks(self, rows: int, length: int) -> tuple[int, int]:
        """Peaks of tensors in training and in validation for a batch of another size, quick."""
        shape = self.shape.resized(rows, length)
        return self.planner.peak(shape), self._validation(shape) or 0

    def _validation(self, shape: Shape) -> int | None:
        """The peak of the validation batch beside a training batch of this shape."""
        if self.validation is None:
            return None
        if isinstance(self.validation, int):
            like = self.shape.resized(self.validation, shape.length)
            return self.planner.validation(replace(like, columns=None))
        # where training's rows are cut, so are these
        cut = shape.length < self.shape.length
        return self.planner.validation(self.validation.cut(shape.length) if cut else self.validation)


@dataclass(frozen=True)
class Estimate:
    """The memory of one training step, in bytes.

    Each term is its own largest value in the step. They do not all live at once: the peak is the largest of the
    `moments`, after the allocator's rounding, and less than the sum of the terms.

    Attributes:
        dtype: of the base's weights.
        base_precision: what the frozen linears' weights are stored in; None: in `dtype`.
        torch_compile: whether the step's blocks are compiled.
        cuda_graphs: whether they are captured as CUDA graphs.
        recordings: bytes that the graphs of one shape of a batch keep between steps, part of the terms and peaks:
            copies of arguments and blocks' outputs (activations), gradients of these (workspace) and of weights
            (gradients). What a step makes inside of blocks is there all the time then, as workspace where it is idle.
        base_weights: the base's own, which any number of deltas share: part of `weights`.
        weights: the base's and the delta's.
        gradients: of what is trained, with their float32 copies where the base has lower precision.
        optimizer: AdamW's two moments in float32, and float32 masters of weights of lower precision.
        activations: what forward makes and keeps for backward, recomputed ones included.
        logits: what is made between the last layer and the loss, and on the way back.
        workspace: what backward and its kernels take and give back; cuBLAS's workspaces (CUDA).
        peak_allocated: of tensors, as torch counts them.
        peak_reserved: what torch's allocator holds of the device (on a CPU: the same as `peak_allocated`).
        context: what the process takes of a CUDA device beside that; in none of the other figures.
        host: bytes of pinned host memory for blocks' inputs (`gradient_checkpointing="offload"`).
        validation: peak of tensors of a validation batch, with all memory of the graphs; None without one.
        moments: forward, loss (both ways), backward, optimizer.
        source: "trace": a few layers of each kind were traced, of the model's own code without weights, and repeated;
            "full trace": all layers were, as they differ.
        question: what the estimate answers, for `largest_batch` and the like; two estimates are equal without it.
    """

    model: str
    method: str
    batch: int
    length: int
    dtype: str
    base_precision: str | None
    device: str
    gradient_checkpointing: Recomputation
    optim: str
    torch_compile: bool
    cuda_graphs: bool
    recordings: int
    trainable_parameters: int
    total_parameters: int
    base_weights: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak_allocated: int
    peak_reserved: int
    context: int
    host: int
    validation: int | None
    moments: tuple[Moment, ...]
    source: str
    question: Question = field(repr=False, compare=False)

    @property
    def peak_moment(self) -> Moment:
        """The moment that makes the peak."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def needed(self) -> int:
        """Bytes of the device that the run takes: training or validation, whichever is more, and the context."""
        return max(self.peak_reserved, self.validation or 0) + self.context

    def fits(self, memory: int | str) -> bool:
        """Whether a device with so much free memory (bytes, or "24GiB") has room for the run."""
        return self.needed <= bytes_of(memory)

    def largest_batch(self, memory: int | str) -> int:
        """The most rows of this length that fit; 0 where not even one does."""
        return _largest(lambda rows: self._needed(rows, self.length), bytes_of(memory), 1, self.batch, _MOST_ROWS)

    def largest_length(self, memory: int | str) -> int:
        """The most tokens of a row that fit with this batch, at most what the base has positions for; 0 for none."""
        most = self.question.planner.workload.max_length or _MOST_TOKENS
        return _largest(lambda tokens: self._needed(self.batch, tokens), bytes_of(memory), 2, self.length, most)

    def advice(self, memory: int | str) -> str:
        """What to change so that it fits, in a sentence or three; empty where it does."""
        if self.fits(memory):
            return ""
        if (self.validation or 0) > self.peak_reserved:
            return (
                "Validation takes more than training: set per_device_eval_batch_size smaller "
                f"(its peak is {shown(self.validation or 0)}, training's {shown(self.peak_reserved)})."
            )
        moment = self.peak_moment
        term = max(moment.terms, key=lambda name: moment.terms[name])
        cut = f"At the peak ({moment.name}) the largest term is {term}: {shown(moment.terms[term])}."
        return " ".join([cut, *self._what_helps(term, bytes_of(memory))])

    def most(self, memory: int | str) -> str:
        """The largest batch and the largest length that fit, in a sentence, by the settings' names."""
        rows, tokens = self.largest_batch(memory), self.largest_length(memory)
        parts = [f"{rows} rows of {self.length} tokens (per_device_train_batch_size={rows})"] if rows else []
        parts += [f"{tokens} tokens in {self.batch} rows (max_length={tokens})"] if tokens else []
        if not parts:
            return f"Neither one row of {self.length} tokens nor {self.batch} rows of 2 tokens fit."
        return f"The most that fits: {', or '.join(parts)}."

    def memory(self) -> dict[str, int]:
        """Terms and peaks: what a result stores beside what was measured."""
        found = {name: getattr(self, name) for name in (*TERMS, "peak_allocated", "peak_reserved")}
        return found if self.validation is None else found | {"validation": self.validation}

    def of_steps(self, steps: Sequence[Sequence[Shape]]) -> Estimate:
        """The estimate with the peaks of some steps of a run, each of some batches: what a run measures of itself. The
        optimizer's states are not there before the end of the first, which holds the longest batch."""
        allocated, reserved = self.question.planner.steps(steps)
        return replace(self, peak_allocated=allocated, peak_reserved=reserved)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        # fmt: off
        names = ("model", "method", "batch", "length", "dtype", "base_precision", "device", "gradient_checkpointing",
                 "torch_compile", "cuda_graphs", "recordings", "optim", "trainable_parameters", "total_parameters",
                 "context", "host", "validation", "source", "needed")
        # fmt: on
        return {
            **{name: getattr(self, name) for name in names},
            **self.memory(),
            "peak_moment": self.peak_moment.name,
            "moments": {moment.name: {**moment.terms, "total": moment.total} for moment in self.moments},
        }

    def _needed(self, rows: int, tokens: int) -> int:
        training, validation = self.question.peaks(rows, tokens)
        # the allocator's share is taken to stay what it is here
        held = training * self.peak_reserved / max(moment.total for moment in self.moments)
        return max(int(held), validation) + self.context

    def _what_helps(self, term: str, memory: int) -> list[str]:
        found = []
        leaner = ORDER[ORDER.index(self.gradient_checkpointing) + 1 :]
        left = [str(mode).lower() for mode in leaner if mode != "offload" or self.device == "cuda"]
        if term in ("weights", "gradients", "optimizer"):
            if self.trainable_parameters >= self.total_parameters:
                found.append("A method that leaves the base as it is (lora, bitfit, prefix) needs a fraction of it.")
                if self.optim != "adamw_8bit":
                    found.append("optim=adamw_8bit keeps 2 bytes a weight of AdamW's moments instead of 8.")
            elif self.dtype == "float32":
                found.append("A base in bfloat16 (--dtype bfloat16) takes half of it.")
            elif self.base_precision is None:
                found.append(
                    "Fewer bits for the frozen base (--base-precision int8, fp8 or nf4) take half of it or less."
                )
            else:
                found.append("No setting makes the base smaller: take a smaller base, or a device with more memory.")
        if term in ("activations", "workspace") and left:
            setting = " or ".join(left) if self.gradient_checkpointing else "auto"
            found.append(
                f"gradient_checkpointing={setting} keeps less of them and recomputes the rest"
                + ("." if self.gradient_checkpointing else f", as much as it takes ({', '.join(left)}).")
            )
        if self.recordings:
            found.append(
                f"cuda_graphs=false keeps no captured blocks ({shown(self.recordings)}), and their memory is free "
                "for all else between steps."
            )
        if term in ("activations", "workspace", "logits") and self.batch > 1 and (rows := self.largest_batch(memory)):
            found.append(f"per_device_train_batch_size={rows} with gradient_accumulation_steps learns the same.")
        return found


def shown(size: float) -> str:
    """Bytes in binary units: 23.4 GiB."""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= scale:
            return f"{size / scale:{'.3g' if size < 100 * scale else ',.0f'}} {unit}"
    return f"{size:.0f} B"


def _largest(needed: Callable[[int], int], memory: int, least: int, near: int, most: int) -> int:
    """The largest number from `least` to `most` whose need is within `memory`, where needs rise; 0 for none. They are
    close to straight lines, so the crossing is guessed by the line through both ends of what is known."""
    if most < least:
        return 0
    low, below = least, needed(least)
    if below > memory:
        return 0
    high = min(max(near, low + 1), most)
    above = needed(high)
    while above <= memory:
        low, below = high, above
        if high == most:
            return most
        slope = 1.1 * (memory - below) / max(below, 1)
        high = min(most, max(high + 1, int(high * min(4.0, 1.0 + slope) + 1)))
        above = needed(high)
    for turn in range(60):
        if high - low <= 1:
            break
        guess = low + int((high - low) * (memory - below) / max(above - below, 1))
        middle = min(max(guess + turn % 2, low + 1), high - 1) if turn < 8 else (low + high) // 2
        found = needed(middle)
        if found <= memory:
            low, below = middle, found
        else:
            high, above = middle, found
    return low
