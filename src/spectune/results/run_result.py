"""The result of one run: `result.json`, units in the names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from spectune.errors import DataError
from spectune.files.atomic import atomic_write_text
from spectune.files.metadata import check_seal, first_problem, read_json, sealed, without_seal
from spectune.files.strict_json import strict_json
from spectune.results.other_work import MachineLoad
from spectune.results.record import Count, Measure, Record, Seconds
from spectune.results.vouched import FILES

_AGAIN = "Remove it and resume: the run goes on from its last checkpoint."


class TrainSource(Record):
    """One of several sources that a run was trained on: its rows, how often an epoch has each (`weight`), and the
    examples that an epoch has of it."""

    rows: Count = 0
    weight: Measure = 1.0
    examples: Count = 0


class RunRecord(Record):
    """A run as a comparison's file has it. Files of earlier versions lack some fields, and in published ones what was
    not measured alone is null; see `RunResult` for what the fields mean."""

    method: str = ""
    name: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    learning_rate: Measure | None = None
    task_type: str = "CAUSAL_LM"
    trainable_parameters: Count | None = None
    stored_parameters: Count | None = None
    total_parameters: Count | None = None
    stored_bytes: Count | None = None
    steps: Count | None = None
    best_step: Count | None = None
    train_tokens: Count | None = None
    target_tokens: Count | None = None
    train_loss: Measure | None = None
    valid_loss: Measure | None = None
    valid_loss_by_source: Mapping[str, Measure | None] = Field(default_factory=dict)
    train_sources: Mapping[str, TrainSource] = Field(default_factory=dict)
    base_valid_loss: Measure | None = None
    valid_perplexity: float | None = None
    train_tokens_per_second: Measure | None = None
    train_seconds: Seconds | None = None
    seconds_by_phase: dict[str, Seconds] = Field(default_factory=dict)
    peak_memory_bytes: dict[str, Count] = Field(default_factory=dict)
    predicted_memory_bytes: dict[str, Count] = Field(default_factory=dict)
    memory_prediction_source: str | None = None
    gradient_checkpointing: bool | str | None = None
    stopped_early: bool = False
    processes: Count = 1
    trained_together: Count = 1
    train_tokens_per_second_alone: Measure | None = None
    metrics: Mapping[str, Measure | None] = Field(default_factory=dict)
    forgetting_kl_nats_per_token: Measure | None = None
    decode_tokens_per_second: Measure | None = None
    decode_tokens_per_second_base: Measure | None = None
    decode_tokens_per_second_merged: Measure | None = None
    decode_tokens_per_second_spread: Measure | None = None
    decode_tokens_per_second_base_spread: Measure | None = None
    decode_tokens_per_second_merged_spread: Measure | None = None
    inference_overhead_range: tuple[Measure, Measure] | None = None
    inference_overhead_merged_range: tuple[Measure, Measure] | None = None
    retained_sha256: str | None = None
    swap_seconds: Seconds | None = None
    machine_load: dict[str, MachineLoad] = Field(default_factory=dict)
    folder: str | None = None
    key: str | None = None
    last_valid_loss: Measure | None = None
    judged_loss: Measure | None = None
    judged_loss_by_source: Mapping[str, Measure | None] = Field(default_factory=dict)
    judged_on: str | None = None
    rows_file: str | None = None
    evaluation_seconds: Seconds | None = None
    forgetting_by_passage: Sequence[Measure | None] | None = None

    @property
    def shared(self) -> bool:
        """Whether its steps were passes that other runs had a part in: then their time and memory are not its own."""
        return self.trained_together > 1

    @property
    def own_tokens_per_second(self) -> float | None:
        """Tokens a second of training by itself; None where that was not measured."""
        return self.train_tokens_per_second_alone if self.shared else self.train_tokens_per_second

    @property
    def own_train_seconds(self) -> float | None:
        """Seconds that its steps take by themselves: of a run that shared passes, its tokens at its own speed."""
        if not self.shared:
            return self.train_seconds
        speed, tokens = self.own_tokens_per_second, self.train_tokens
        return tokens / speed if speed and tokens is not None else None

    @property
    def loss(self) -> float | None:
        """The loss that the run is judged by; the validation loss where no rows were judged apart from those."""
        return self.valid_loss if self.judged_loss is None else self.judged_loss


class RunResult(RunRecord):
    """One training with one method, seed and learning rate.

    Losses are nats per target token; with a head (`task_type` SEQ_CLS or TOKEN_CLS) nats per row or per word, or
    squared errors, and what a head has no meaning for is None: perplexity, forgetting, decoding. `trainable_parameters`
    counts what was trained (a prefix's reparametrisation too), `stored_parameters` what is stored and used at
    inference, `total_parameters` the base's.
    `peak_memory_bytes`: `<phase>_<kind>`. Phases: `train`, on CUDA all steps, elsewhere the first two (of which one
    holds the longest rows); `valid`, the longest batch of validation; `load`, putting the delta onto its base;
    `generate`, decoding in a batch. Kinds: `allocated`, tensors (CUDA: by torch's allocator; elsewhere counted as they
    are made and freed, weights and optimizer states included, scratch space within an operation not); `reserved`
    (CUDA), what the allocator held of the device; `resident` (CPU), physical memory of the whole process, Python and
    libraries included.
    `seconds_by_phase`: where the time of the whole run went, see `spectune.phases`; what is in no phase is "other", so
    that the sum is the time that passed, over all calls where it was resumed.
    `train_tokens_per_second` counts computing alone: no start-up, no making of batches, no validation, no writing, and
    not the first steps, in which memory is counted. `train_seconds` are those of all steps.
    `predicted_memory_bytes` is the plan of the longest batch, made before the first step (`spectune.plan`): terms,
    and `peak_allocated` and `peak_reserved` to compare with `train_allocated` and `train_reserved`;
    `memory_prediction_source` is its source, "none" where the base could not be described.
    `processes`: that shared out each step's rows; speeds are of all of them together, peaks of the largest.
    `trained_together`: the most runs, this one among them, that were trained at the same time on one base. Where it is
    more than 1, `train_seconds` are its part of the time of all of them, `train_tokens_per_second` and the load are of
    that, and no peak of training is its own but one that was measured by itself: `own_tokens_per_second` and
    `own_train_seconds` are what it takes alone, by `train_tokens_per_second_alone`, of a few steps that a comparison
    takes for it.
    `gradient_checkpointing`: what was recomputed (false, "selective", true, "offload"), whatever the setting was.
    Decoding speeds are medians over rounds, their `_spread` is half of what they range over; `inference_overhead_range`
    are the least and the most extra time of a round, as shares of the bare base's time in the same round.
    `machine_load`: what else the machine did meanwhile, in training ("train") and in decoding ("decode").
    `retained_sha256`: of the passages that forgetting was measured on; `forgetting_by_passage`: nats, summed over each.
    `valid_loss` is the kept weights', `last_valid_loss` that after the last step: above it where a run overfits.
    `valid_loss_by_source` and `judged_loss_by_source`: the same losses over the rows of each source, by its name; empty
    where the rows are of one source. `train_sources`: of a run on several, or on weighted ones.
    `judged_loss` and `metrics`: of the kept weights on the rows that are judged (`judged_on`: "valid" or "test"), row
    by row in `rows_file`, a path within the comparison's folder. `key`: of all that the run depends on.
    `decode`: speeds by batch size, see `spectune.comparing.measure`. Fields that only a comparison measures
    are None after `train`.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    name: str
    settings: dict[str, Any]
    seed: int
    learning_rate: Measure
    trainable_parameters: Count
    stored_parameters: Count
    total_parameters: Count
    steps: Count
    train_tokens: Count
    target_tokens: Count
    train_loss: Measure | None
    train_tokens_per_second: Measure
    train_seconds: Seconds
    metrics: dict[str, Measure] = Field(default_factory=dict)
    forgetting_by_passage: list[Measure] | None = None
    decode: dict[str, dict[str, Any]] | None = None

    def with_measured(self, found: Mapping[str, Any]) -> RunResult:
        """This result with fields that were measured after training; `peak_memory_bytes` and `machine_load` are added
        to what is there."""
        both = {key: {**getattr(self, key), **found.get(key, {})} for key in ("peak_memory_bytes", "machine_load")}
        return self.model_copy(update={**found, **both})

    def save(self, path: str | Path, files: Mapping[str, Any] | None = None) -> None:
        """Write as JSON with a seal, atomically; a number that is not finite becomes null. `files`: of the run's other
        files, what they are, see `spectune.results.vouched`."""
        vouched = {FILES: files} if files else {}
        atomic_write_text(path, strict_json(sealed({**self.model_dump(mode="json"), **vouched})) + "\n")

    @classmethod
    def load(cls, path: str | Path, *, warn: Callable[[str], None] | None = None) -> RunResult:
        """Read `result.json`.

        Args:
            warn: is told where the file was changed after it was written; by default that is an error.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = Path(path)
        content = read_json(path, what="a run's result", again=_AGAIN)
        if content is None:
            raise DataError(f"{path} cannot be read as a run's result: there is no such file")
        try:
            found = cls.model_validate({key: value for key, value in without_seal(content).items() if key != FILES})
        except ValidationError as error:
            raise DataError(f"{path} is not a run's result ({first_problem(error)}). {_AGAIN}") from error
        check_seal(path, content, _AGAIN, warn=warn)
        return found
