"""What a comparison was asked for, and from that the jobs of its arms: one for each kind of model that they need."""

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing import conditions
from spectune.comparing.arms import Arm, recorded_arms, tracks_of, with_labels
from spectune.comparing.conditions import RecordedConditions
from spectune.comparing.inputs import Inputs, Rows
from spectune.comparing.intact import check_intact
from spectune.comparing.job import Job
from spectune.comparing.label_words import SEPARATOR, check_same
from spectune.comparing.measure import retained_passages
from spectune.comparing.schedule import PRESETS, Schedule
from spectune.data import Labels
from spectune.data.head_labels import SEQ_CLS, TOKEN_CLS, classes_of_checkpoint
from spectune.deltas import attached, base_name
from spectune.errors import ConfigError, DataError
from spectune.families import base_precision as precision_of
from spectune.families import describe, fingerprint, vocabulary_rows
from spectune.files.atomic import atomic_write_text
from spectune.files.core_yaml import yaml_text
from spectune.files.plain_console import PlainConsole, print_line
from spectune.objectives import objective_of
from spectune.phases import Phases
from spectune.planning import reference_shares
from spectune.results import Limits
from spectune.results.comparison_file import Base, Data
from spectune.storage import TINY, load, load_config
from spectune.training import TrainingConfig, environment
from spectune.training.identity import FREE
from spectune.training.prepare import dated, max_length

#: settings that no result depends on (speed and memory do on recomputation), and the one that differs between its runs
NOT_SHARED = (FREE - {"gradient_checkpointing"}) | {"learning_rate"}
#: what decides between a head and label words, whose losses are of different things
COMMON_METRIC = "accuracy"


@dataclass(frozen=True)
class Beginning:
    """What was asked for, as `compare` has it; `where`: how the base is loaded, `own`: a comparison's own
    settings, `given`: the arms as they were given.

    Attributes:
        tracks: arms that learn the same of the rows, and so are of one kind of model; language models first.
    """

    base: str | Path | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    where: Mapping[str, Any]
    rows: Rows
    given: list[Arm]
    arms: list[Arm]
    settings: TrainingConfig
    own: Mapping[str, Any]
    folder: Path
    before: RecordedConditions | None
    retain: str | Path | None
    limits: Limits | None
    origin: Mapping[str, Any] | None
    console: Console | None
    phases: Phases

    @classmethod
    def of(
        cls, base: str | Path | PreTrainedModel, arms: list[Arm], rows: Rows, settings: TrainingConfig, **asked: Any
    ) -> Self:
        """With what each arm learns of the rows. Raises ConfigError: arms that no measure decides between, or that are
        not for the model that was given. Raises DataError: rows without the labels that are to be learned."""
        if isinstance(base, PreTrainedModel):
            kind = objective_of(base).task_type
            if any(arm.task_type not in ("auto", kind) for arm in arms) or settings.task_type not in ("auto", kind):
                raise ConfigError(
                    f"arms of other task types than {kind}, which the model that was given is for: give the base's "
                    "name instead of a model, so that each kind of model can be loaded"
                )
            settings = settings.model_copy(update={"task_type": kind})
            labels = Labels.of_model(kind, base.config)
            learned = [dataclasses.replace(arm, task_type=kind, labels=labels) for arm in arms]
        else:
            config = load_config(str(base), trust_remote_code=asked["where"]["trust_remote_code"])
            known = {kind: classes_of_checkpoint(config, kind) for kind in (SEQ_CLS, TOKEN_CLS)}
            learned = with_labels(arms, rows.train, settings.task_type, known)
        return cls(base=base, given=arms, arms=learned, rows=rows, settings=settings, **asked)

    @functools.cached_property
    def tracks(self) -> list[list[Arm]]:
        return tracks_of(self.arms)

    def jobs(self) -> Iterator[Job]:
        """The job of each track. A model is loaded when its job is asked for: who drops the one before has one model at
        a time."""
        settings, first = self._first()
        state = settings, first.schedule, first.conditions
        yield first
        del first
        for track in self.tracks[1:]:
            yield self._later(track, *state)

    def _first(self) -> tuple[TrainingConfig, Job]:
        """The job of the first track, and the settings that all have."""
        arms, phases, preset = self.tracks[0], self.phases, self.own["preset"]
        model, tokenizer = self._load(arms[0].labels)
        _check_base(model, preset, named=isinstance(self.base, str | Path))
        length = _max_length(model, self.arms, self.settings, self.before)
        settings = dated(_begun(self.settings, length, self.before), tokenizer)
        self._say_what_is_learned(settings)
        all_inputs = phases.call("rows", self._inputs, tokenizer, settings, vocabulary_rows(model))
        (inputs, own), text = all_inputs[0], list[list[int]]()
        if arms[0].labels is None:
            virtual = max(arm.method.virtual_tokens for arm in self.arms)
            how = {"virtual_tokens": virtual}
            text = phases.call("forget", retained_passages, model, tokenizer, self.retain, settings.seed, **how)
        more = {"seeds": self.own["seeds"], "fractions": self.own["fractions"]}
        schedule = Schedule.of(PRESETS[preset], settings, *inputs.train_size, **more)
        job = Job(
            self.folder, "", arms[0].labels, model, tokenizer, arms, own, inputs, text, schedule,
            self._origin(arms[0].labels), self.console, phases, loaded=self.where, together=self.own["together"],
        )  # fmt: skip
        learned = [found for found, _ in all_inputs]
        if self.before is not None and inputs.task.custom:
            # what a folder goes on with is known before any code runs
            conditions.check(self.before, self._conditions(job, settings, learned), self.folder)
        learned = [found.with_code() for found in learned]
        job.inputs = learned[0]
        job.conditions = self._checked(self._conditions(job, settings, learned))
        self._write_config(str(model.config._name_or_path))
        phases.add(job.conditions.seconds_by_phase)
        return settings, job

    def _later(
        self, arms: list[Arm], settings: TrainingConfig, schedule: Schedule, conditions: RecordedConditions
    ) -> Job:
        model, tokenizer = self._load(arms[0].labels)
        vocab_size, place = vocabulary_rows(model), self.tracks.index(arms)
        inputs, own = self.phases.call("rows", self._inputs, tokenizer, settings, vocab_size)[place]
        return Job(
            self.folder, arms[0].task_type, arms[0].labels, model, tokenizer, arms, own, inputs.with_code(), [],
            schedule, self._origin(arms[0].labels), self.console, self.phases, conditions, loaded=self.where,
            together=self.own["together"],
        )  # fmt: skip

    def _load(self, labels: Labels | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        base, tokenizer, precision = self.base, self.tokenizer, self.where["base_precision"]
        with self.phases.of("load"):
            if isinstance(base, PreTrainedModel) and tokenizer is not None and precision is None:
                return base, tokenizer
            head = {} if labels is None or isinstance(base, PreTrainedModel) else labels.load_options
            model, own = load(base, **self.where, **head)
            return model, tokenizer or own

    def _inputs(
        self, tokenizer: PreTrainedTokenizerBase, settings: TrainingConfig, vocab_size: int | None
    ) -> list[tuple[Inputs, TrainingConfig]]:
        """The rows of each track, encoded, and the settings of its runs. Raises DataError: tracks that would be judged
        on other rows."""
        judged: dict[str, Any] = {name: self.own[name] for name in ("metric", "generate_rows", "choice_normalization")}
        found = []
        for track in self.tracks:
            labels, rows = track[0].labels, self.rows
            own = settings.model_copy(update={"task_type": track[0].task_type})
            if labels is None and (words := self._words) is not None:
                rows = rows.in_words(words)
                own = own.model_copy(update={"separator": settings.separator or self._separator})
            found.append((Inputs.of(rows, tokenizer, own, vocab_size=vocab_size, labels=labels, **judged), own))
        for inputs, _ in found[1:]:
            check_same(found[0][0].task.rows, inputs.task.rows)
        lacking = [inputs for inputs, _ in found if COMMON_METRIC not in inputs.task.higher_is_better]
        if len(found) > 1 and lacking:
            raise DataError(
                f"label words and heads are compared by {COMMON_METRIC}, and {lacking[0].task.describe()} Expected "
                "answers that are a few short texts over and over, or `choices` in the rows"
            )
        return found

    @property
    def _words(self) -> Labels | None:
        """The classes whose names language models learn, where they stand beside heads."""
        return next((arm.labels for arm in self.arms if arm.labels is not None), None)

    def _origin(self, labels: Labels | None) -> Mapping[str, Any] | None:
        """Entries for the config.yaml of a track's runs."""
        if labels is not None or self._words is None:
            return self.origin
        return {**(self.origin or {}), "row_labels": list(self._words.names)}

    @property
    def _separator(self) -> str:
        """What parts a text from its label's words where no separator is given; prompts are joined as they are."""
        return SEPARATOR if any(row.text is not None for row in self.rows.train) else ""

    def _say_what_is_learned(self, settings: TrainingConfig) -> None:
        if self._words is not None:
            self._print(f"task: {self._words.describe()}")
        if len(self.tracks) > 1 and any(row.text is not None for row in self.rows.train):
            separator = settings.separator or self._separator
            self._print(f"label words: a text is asked with {separator!r} behind it, and answered with its class")

    def _print(self, line: str) -> None:
        print_line(self.console or PlainConsole(), line)

    def _checked(self, found: RecordedConditions) -> RecordedConditions:
        """Check that the conditions are those of an earlier call (`before`), take over what it measured of the base,
        and write them."""
        before, folder = self.before, self.folder
        found.limits = self.limits or (before.limits if before is not None else Limits())
        if before is not None:
            found.seconds_by_phase = before.seconds_by_phase
            conditions.check(before, found, folder)
            check_intact(folder, [arm.name for arm in self.arms])
            found.base = Base(**{**found.base.to_dict(), **before.base.to_dict()})
            found.other_bases |= before.other_bases
            if before.metric_code not in (None, found.metric_code):
                # what was measured of rows is judged anew, from the weights that are kept
                for path in (folder / "base" / "rows.jsonl", *folder.glob("runs/*/*/rows.jsonl")):
                    path.unlink(missing_ok=True)
            found.files = {name: digest for name, digest in before.files.items() if (folder / name).is_file()}
        found.write(folder / conditions.FILE)
        return found

    def _conditions(self, job: Job, settings: TrainingConfig, all_inputs: Sequence[Inputs]) -> RecordedConditions:
        """What all runs share; `identity` is what their results depend on."""
        model, inputs, passages = job.model, job.inputs, job.passages
        name, family, dtype = base_name(model), describe(model), str(model.dtype).removeprefix("torch.")
        base = {"name": name, "total_parameters": family.num_parameters, "device": str(model.device), "dtype": dtype}
        if (precision := precision_of(model)) is not None:
            base["precision"] = precision
        retained: dict[str, Any] = {}
        if job.labels is None:
            text = str(self.retain) if self.retain is not None else "sampled from the base at temperature 1"
            retained = {"retained_passages": len(passages), "retained_tokens": sum(map(len, passages))}
            retained |= {"retained_from": text}
        decided = {"decided_by": COMMON_METRIC} if len(self.tracks) > 1 else {}
        learned = {arms[0].task_type: found.identity() for arms, found in zip(self.tracks, all_inputs, strict=True)}
        return RecordedConditions(
            base=Base(**base),
            other_bases={track[0].task_type: Base(**base) for track in self.tracks[1:]},
            fingerprint=fingerprint(model, family),
            data=Data(
                **inputs.describe(), **retained, **decided,
                target_tokens_per_step=job.schedule.target_tokens_per_step,
            ),
            settings=settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
            preset=job.schedule.record(len(inputs.valid.examples)),
            environment=environment(),
            scale=reference_shares([arm.method for arm in self.arms]),
            arms=[arm.record() for arm in self.arms],
            identity={
                **settings.model_dump(mode="json", exclude=NOT_SHARED),
                "base": [name, family.num_parameters, dtype, *([precision] if precision else [])],
                **inputs.identity(),
                "passages_sha256": hashlib.sha256(repr(passages).encode()).hexdigest(),
                **({"learned": learned} if len(learned) > 1 else {}),
            },
            metric_code=[metric.code_sha256 for metric in inputs.task.custom],
        )  # fmt: skip

    def _write_config(self, name: str) -> None:
        """The comparison's config.yaml: what `--resume` reads where the command line says nothing. What a resumption
        goes on with stays as it was."""
        path = self.folder / "config.yaml"
        if path.is_file():
            return
        recorded = {
            "model": name,
            **(self.origin or {}),
            **recorded_arms(self.given),
            **{key: value for key, value in self.own.items() if value not in (None, [])},
            **self.settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, yaml_text(recorded))


def _begun(settings: TrainingConfig, max_length: int, before: RecordedConditions | None) -> TrainingConfig:
    """The settings with the length of rows, and with the date of the day on which the comparison began, where chat
    templates saw one."""
    recorded = before.identity.get("template_date") if before is not None else None
    date = settings.template_date or (datetime.date.fromisoformat(recorded) if recorded else None)
    return settings.model_copy(update={"max_length": max_length, "template_date": date})


def _check_base(model: PreTrainedModel, preset: str, *, named: bool) -> None:
    if PRESETS[preset].own_process and not (named or base_name(model) == TINY):
        raise ConfigError(
            f"preset {preset} loads the base anew in processes of its own: name it, instead of giving a model"
        )
    if attached(model):
        raise ConfigError(f"the model has deltas attached already ({', '.join(attached(model))}): detach them first")


def _max_length(
    model: PreTrainedModel, arms: Sequence[Arm], settings: TrainingConfig, before: RecordedConditions | None
) -> int:
    """The same tokens of every row for all: as many as the method with the most virtual tokens leaves room for;
    where a comparison goes on with other methods, as many as it began with, if they leave room for that."""
    length = min(max_length(model, arm.method, settings) for arm in arms)
    if before is None or settings.max_length is not None:
        return length
    return min(length, int(before.identity["max_length"]))
