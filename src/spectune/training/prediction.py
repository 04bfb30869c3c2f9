"""What a run will take of memory, said before its first step; refused where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from spectune.blocks.execution import Execution, Packing
from spectune.blocks.recompute import Recomputation
from spectune.compute.cudnn import cudnn_allowed
from spectune.compute.memory import counts_tensors, release_workspaces
from spectune.data import Example
from spectune.deltas import Delta
from spectune.errors import DoesNotFitError, first_line
from spectune.families import family_from_config
from spectune.planning.allocator import ROUND
from spectune.planning.device_memory import free_memory
from spectune.planning.estimate import Estimate, shown
from spectune.planning.memory_plan import cheapest_that_fits
from spectune.planning.memory_plan import estimate as estimate_of
from spectune.planning.shape import Shape
from spectune.planning.workload import Workload
from spectune.training.config import TrainingConfig
from spectune.training.decisions import decide, decide_run, possible_modes
from spectune.training.distribution import World
from spectune.training.peaks import MEMORY_STEPS
from spectune.training.prepare import Prepared, steps_of_run
from spectune.training.step_batches import Batches

log = logging.getLogger("spectune")

WORDS: dict[Recomputation, str] = {
    False: "nothing is recomputed",
    "selective": "all but matrix products and attention is recomputed (selective)",
    True: "every block is recomputed (true)",
    "offload": "every block is recomputed, its input kept in host memory (offload)",
}
#: a run is refused where its tensors alone, with a margin for the prediction's error (`margin_of`), are more than there
#: is. The plan of compiled blocks that recompute is up to 6% too low (docs/decisions.md, 2026-11-28)
MARGIN, COMPILED_MARGIN = 1.03, 1.06
#: what of a plan's figures grows with what the process holds beside the model
PEAKS = ("peak_allocated", "peak_reserved", "validation")
#: steps of a run that are looked at for its largest batch
_LOOKED_AT = 1000


@dataclass(frozen=True)
class PlannedBatches:
    """The batches that a run's memory follows from.

    Attributes:
        longest: the longest of training, padded: a pack's batch has no more tokens, so what is refused, and advised, is
            by that.
        steps: of the steps whose peak is the run's measured one, as this process runs them (see `_planned_steps`).
        validation: the longest of validation, or rows of one that is as long as training's; None where there is none.
        lengths: that padded batches are filled up to, in the order in which they come.
    """

    longest: Shape
    steps: tuple[tuple[Shape, ...], ...]
    validation: Shape | int | None
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, rows: tuple[Sequence[Example], Sequence[Example]], config: TrainingConfig, packing: Packing, world: World,
        device_type: str
    ) -> PlannedBatches:  # fmt: skip
        """Of a run on these rows of training and of validation."""
        examples, valid = rows
        padding = replace(packing, on=False)
        [[first, *_], *_] = _planned_steps(examples, config, padding, world, "cpu")
        steps = _planned_steps(examples, config, packing, world, device_type)
        return cls(
            shape_of(first, padding),
            tuple(tuple(shape_of(packs, packing) for packs in step) for step in steps),
            _validation(valid, config, padded=len({row.length for [row] in first}) > 1),
            _lengths_as_they_come(examples, config, packing, world),
        )

    def planned(self, execution: Execution) -> Execution:
        """The execution as the planner takes it."""
        packing = replace(execution.packing, lengths=self.lengths) if execution.graphs else execution.packing
        return replace(execution, packing=packing)


@dataclass(frozen=True)
class Prediction:
    """How a run is executed, and what it will take of memory.

    Attributes:
        execution: with the recomputation that it takes to fit.
        estimate: of its longest batch, with the optimizer's states: the most that the run takes.
        memory: terms, and the peaks of the steps that are measured and of validation; on CUDA with what the process
            holds beside the model (`held`), which counts in what is measured.
        source: "trace" or "full trace" as the estimate says, "none" where the base could not be described, None where
            nobody wants it.
    """

    execution: Execution
    estimate: Estimate | None = None
    memory: dict[str, int] = field(default_factory=dict)
    source: str | None = None


class Predictions:
    """The newest plans of runs: a search runs the same steps at many rates."""

    kept = 8

    def __init__(self) -> None:
        self._known: dict[object, tuple[Estimate, dict[str, int]]] = {}

    def of(self, workload: Workload, found: PlannedBatches, execution: Execution) -> tuple[Estimate, dict[str, int]]:
        """The estimate of a run, and its terms with the peaks of the steps that are measured."""
        known = replace(workload, config=None), workload.config.to_json_string()  # type: ignore[arg-type]
        key = (*known, found, execution, cudnn_allowed())
        if key not in self._known:
            while len(self._known) >= self.kept:
                del self._known[next(iter(self._known))]
            with torch.random.fork_rng(devices=[]):
                estimate = estimate_of(workload, found.longest, found.validation, execution)
                self._known[key] = estimate, estimate.of_steps(found.steps).memory()
        return self._known[key]


def predict(
    delta: Delta, prepared: Prepared, world: World, known: Predictions | None = None,
    decided_as: TrainingConfig | None = None,
) -> Prediction:  # fmt: skip
    """How this run is executed, with the recomputation that it takes to fit, and what it takes then. What keeps the
    planner from describing a base is logged, and keeps nobody from training it: then the first of what may be
    recomputed stands.

    Args:
        known: plans that were made before, and are kept.
        decided_as: settings of the run that this one stands for; the config's own by default.

    Raises:
        ConfigError: as `decide`.
    """
    model, config = delta.model, prepared.config
    execution = decide_run(delta, prepared, world.size, decided_as)
    if config.memory_check == "off":
        return Prediction(execution)
    possible = possible_modes(config, model.device.type, model)
    free, known = world.least(free_memory(model.device)), known or Predictions()
    try:
        rows = prepared.examples, prepared.valid
        found = PlannedBatches.of(rows, config, execution.packing, world, model.device.type)
        workload = Workload.of(model, delta.method, None, model.device, optim=config.optim,
                               accumulates=config.gradient_accumulation_steps > 1)  # fmt: skip

        def planned(mode: Recomputation) -> tuple[Execution, Estimate, dict[str, int]]:
            how = execution.recomputing(mode)
            return how, *known.of(workload, found, found.planned(how.of_first_steps(model.device.type)))

        how, estimate, memory = planned(possible[0])
        if free is not None:
            first, room = estimate, _room(free, delta)
            how, estimate, memory = cheapest_that_fits(possible, planned, lambda made: _fits_well(made[1], room))
            if how.recomputation != possible[0]:
                how = how.because("gradient_checkpointing", _why(estimate, first, room))
    except Exception as error:
        log.warning("the memory of this run is not predicted: %s: %s", type(error).__name__, first_line(error))
        return Prediction(execution, source="none")
    return Prediction(how, estimate, _beside(memory, held_beside(delta)), estimate.source)


def _beside(memory: dict[str, int], held: int) -> dict[str, int]:
    """A plan's terms and peaks, beside so many bytes that the process holds."""
    peaks = {name: size + held for name, size in memory.items() if name in PEAKS}
    return memory | peaks | ({"held": held} if held else {})


def held_beside(delta: Delta) -> int:
    """Bytes that tensors of this process take of the CUDA device beside the base and the delta: other models, say; 0
    elsewhere."""
    device = delta.model.device
    if device.type != "cuda":
        return 0
    release_workspaces()  # which are planned
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(delta) if t.is_cuda}
    own = sum(-(-size // ROUND) * ROUND for size in storages.values())
    return max(0, torch.cuda.memory_allocated(device) - own)


def _tensors(delta: Delta) -> list[torch.Tensor]:
    return [*delta.model.parameters(), *delta.model.buffers(), *delta.parameters()]


def plan_unloaded(
    workload: Workload, config: TrainingConfig, examples: Sequence[Example], valid: Sequence[Example], *,
    length: int, limit: int | None,
) -> Prediction:  # fmt: skip
    """The same of a base that is not loaded: what only the model can tell is taken to be so (see `decide`).

    Args:
        examples, valid: rows of training and of validation; without any, batches of rows of `length` tokens are
            planned.
        limit: bytes of the device, all of them free; without, nothing is recomputed that the config does not ask for.

    Raises:
        ConfigError: as `decide` and `spectune.planning.plan`.
    """
    device = workload.device
    lengths = [example.length for example in examples] or [length]
    steps = steps_of_run(examples, config)
    family = family_from_config(workload.config, workload.objective)
    execution = decide(config, family, workload.method, lengths, device, steps=steps, workload=workload)
    batch, judged = Shape.whole(config.per_device_train_batch_size, length), config.per_device_eval_batch_size
    found = PlannedBatches(batch, (), judged)
    if examples:
        found = PlannedBatches.of((examples, valid), config, execution.packing, World(), device)

    def planned(mode: Recomputation) -> tuple[Execution, Estimate]:
        how = execution.recomputing(mode)
        return how, estimate_of(workload, found.longest, found.validation, found.planned(how.of_first_steps(device)))

    possible = possible_modes(config, device, None)
    how, estimate = (
        planned(possible[0])
        if limit is None
        else cheapest_that_fits(possible, planned, lambda pair: pair[1].fits(limit))
    )
    measured = estimate.of_steps(found.steps) if found.steps else estimate
    return Prediction(how, estimate, measured.memory(), estimate.source)


def _why(estimate: Estimate, first: Estimate, room: int) -> str:
    """Why the run recomputes more than in its first estimate."""
    host = f"; {shown(estimate.host)} of host memory" if estimate.host else ""
    return (
        f"gradient checkpointing: {WORDS[estimate.gradient_checkpointing]}: predicted "
        f"{shown(estimate.peak_reserved)}, where {shown(first.peak_reserved)} would be taken if "
        f"{WORDS[first.gradient_checkpointing]}, and {shown(room)} is free{host}"
    )


def check_memory(predicted: Prediction, delta: Delta, check: str) -> None:
    """Compare with what is free on the model's device. Raises DoesNotFitError where it does not fit and `check` is
    "refuse"; otherwise a warning is logged."""
    estimate, free = predicted.estimate, free_memory(delta.model.device)
    if estimate is None or free is None:
        return
    room, least, margin = _room(free, delta), _least(estimate), margin_of(estimate)
    if least * margin <= room and _host_suffices(estimate):
        return
    # the context is the process's and was taken before
    memory = int(room / margin) + estimate.context
    message = (
        f"{delta.method.label} with a batch of {estimate.batch} rows of {estimate.length} tokens is predicted to take "
        f"{shown(least)} of memory ({WORDS[estimate.gradient_checkpointing]}), and {shown(room)} is free for it. "
        + (f"It takes {shown(estimate.host)} of host memory too. " if estimate.host else "")
        + f"{estimate.advice(memory)} {estimate.most(memory)} memory_check=warn tries it all the same."
    )
    if check == "refuse":
        raise DoesNotFitError(message)
    log.warning("%s", message)


def margin_of(estimate: Estimate) -> float:
    """The factor by which what a run allocates may be more than its estimate."""
    return COMPILED_MARGIN if estimate.torch_compile and estimate.gradient_checkpointing else MARGIN


def _fits_well(estimate: Estimate, room: int) -> bool:
    """Whether there is room for what the allocator holds too (`check_memory` refuses only where tensors alone are too
    many): recomputing costs less than running out of memory. For block inputs, host memory has to suffice."""
    return max(estimate.peak_reserved, int(margin_of(estimate) * _least(estimate))) <= room and _host_suffices(estimate)


def _host_suffices(estimate: Estimate) -> bool:
    return not estimate.host or (free := free_memory("cpu")) is None or estimate.host <= free


def _least(estimate: Estimate) -> int:
    return max(estimate.peak_allocated, estimate.validation or 0)


def _room(free: int, delta: Delta) -> int:
    """Bytes for the run: the model is there already, and so is what the plan counts as its weights."""
    return free + sum(t.numel() * t.element_size() for t in {*delta.model.parameters(), *delta.parameters()})


def _planned_steps(
    examples: Sequence[Example], config: TrainingConfig, packing: Packing, world: World, device_type: str
) -> list[list[list[list[Example]]]]:
    """The batches (of packs of rows) of the steps whose peak is what is measured, as this process runs them: where
    tensors are counted, the first steps; epoch 0 begins with the longest row. On CUDA all steps are measured: with the
    first come the one with most places and the one with most targets. Of a step's batches the first two: the others
    are no longer, and find gradients there as the second does."""
    batches = Batches(examples, config, packing, world)
    windows = batches.windows(0)
    total = config.max_steps if config.max_steps > 0 else round(len(windows) * config.num_train_epochs)
    count = max(1, min(MEMORY_STEPS, total))
    first = (windows * MEMORY_STEPS if len(windows) == 1 else windows)[:count]

    def step(window: list[list[int]]) -> list[list[list[Example]]]:
        # a process without rows of its own is taken to have the first ones
        found = [batch for batch in batches.of_step(window) if batch][:2] or [[[row] for row in window[0]]]
        return [[[examples[row] for row in pack] for pack in batch] for batch in found]

    steps = [step(window) for window in first]
    if counts_tensors(device_type):
        return steps
    later, epoch = list(windows), 1
    while len(later) < min(total, _LOOKED_AT):
        later += batches.windows(epoch)
        epoch += 1
    others = [step(window) for window in later[count : min(total, _LOOKED_AT)]]
    most = [max(others, key=size, default=steps[0]) for size in (_places, _targets)]
    return [*steps, *(step for number, step in enumerate(most) if step not in most[:number])]


def _lengths_as_they_come(
    examples: Sequence[Example], config: TrainingConfig, packing: Packing, world: World
) -> tuple[int, ...]:
    """The lengths that padded batches are filled up to, in the order of their first batches; last what it lacks."""
    found: dict[int, None] = {}
    if packing.lengths:
        batches = Batches(examples, config, packing, world)
        for window in batches.windows(0):
            for batch in window:
                found[packing.filled(1, max(batches.lengths[row] for row in batch))[1]] = None
            if len(found) == len(packing.lengths):
                break
    return (*found, *(length for length in packing.lengths if length not in found))


def _places(step: Sequence[Sequence[Sequence[Example]]]) -> int:
    return max(len(batch) * max(sum(row.length for row in pack) for pack in batch) for batch in step)


def _targets(step: Sequence[Sequence[Sequence[Example]]]) -> int:
    return max(sum(row.target_tokens for pack in batch for row in pack) for batch in step)


def _validation(valid: Sequence[Example], config: TrainingConfig, *, padded: bool) -> Shape | None:
    """The longest batch of validation, whose rows always have a mask where they are padded."""
    if not valid:
        return None
    whole = shape_of([[row] for row in valid])
    rows = min(config.per_device_eval_batch_size, whole.rows)
    longest = shape_of([[row] for row in sorted(valid, key=lambda row: -row.length)[:rows]])
    return Shape(rows, whole.length, whole.targets, rows * whole.targets, padded, longest.columns)


def shape_of(packs: Sequence[Sequence[Example]], packing: Packing | None = None) -> Shape:
    """Of a batch of these packs of rows; without `packing`, of one row each, with a mask where it is padded."""
    rows = [[row.length for row in pack] for pack in packs]
    lengths = [sum(pack) for pack in rows]
    targets = [sum(row.target_tokens for row in pack) for pack in packs]
    size = (len(packs), max(lengths)) if packing is None else packing.filled(len(packs), max(lengths))
    padded = min(lengths) < size[1] and (packing is None or not packing.mask_free)
    found = Shape(*size, max(targets), sum(targets), padded, _columns(packs))
    if packing is None or not packing.on:
        return found
    return replace(found, documents=tuple(map(tuple, rows)), kernel=packing.kernel)


def _columns(packs: Sequence[Sequence[Example]]) -> int:
    """Places of a batch of such rows, packed or padded on the right, that predict a target of any row."""
    found: set[int] = set()
    for pack in packs:
        begin = 0
        for row in pack:
            length = row.length
            found.update(range(begin + max(0, length - row.target_tokens - 1), begin + length - 1))
            begin += length
    return len(found)
