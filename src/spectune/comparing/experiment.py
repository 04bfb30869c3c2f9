"""Compare methods on one base and one data set: search, repeat, measure, judge, recommend."""

import datetime
import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing import conditions
from spectune.comparing.comparison import Comparison
from spectune.comparing.conditions import RecordedConditions
from spectune.comparing.final_runs import base_rows, judge_base, valid_loss_of_base
from spectune.comparing.inputs import Inputs, Rows
from spectune.comparing.job import Arm, Job
from spectune.comparing.measure import retained_passages
from spectune.comparing.runner import Runner
from spectune.comparing.schedule import PRESETS, Schedule
from spectune.deltas import Method, attached, base_name
from spectune.errors import ConfigError, InterruptedRun
from spectune.families import base_precision as precision_of
from spectune.families import describe, fingerprint, vocabulary_rows
from spectune.files.atomic import atomic_write_text
from spectune.inference import CHOICE_NORMALIZATIONS
from spectune.methods import BY_NAME, method_from_name
from spectune.phases import Phases
from spectune.planning import reference_shares
from spectune.results import Limits
from spectune.results.comparison_file import Base, Data
from spectune.storage import TINY, load
from spectune.training import TrainingConfig, environment
from spectune.training.identity import FREE
from spectune.training.prepare import dated, max_length

GENERATE_ROWS = 64
#: settings that no result depends on (speed and memory do on recomputation), and the one that differs between its runs
NOT_SHARED = (FREE - {"gradient_checkpointing"}) | {"learning_rate"}
#: files of a folder that is no comparison which can be resumed
OF_OTHER_RUNS = ("comparison.json", "result.json", "identity.json", "runs")


def compare(
    base: str | Path | PreTrainedModel, train_rows: Any, valid_rows: Any = None, *, test_rows: Any = None,
    methods: Sequence[str | Method] | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None, config: TrainingConfig | None = None, preset: str = "default",
    seeds: int | None = None, fractions: Sequence[float] = (), metric: str = "auto",
    generate_rows: int = GENERATE_ROWS, limits: Limits | None = None, seed: int | None = None, device: str = "auto",
    dtype: str = "auto", base_precision: str | None = None, retain: str | Path | None = None, resume: bool = False,
    choice_normalization: str = "sum", origin: Mapping[str, Any] | None = None, console: Console | None = None,
) -> Comparison:  # fmt: skip
    """Search each method's learning rate, train it with several seeds, measure all alike, and say what differs.

    Args:
        base: a loaded model, a hub id, a folder, or "spectune-tiny".
        train_rows, valid_rows: paths, lists of dicts, `datasets` objects, or several of them with weights, as a list of
            `spectune.Source`; without `valid_rows` a seeded tenth of the training rows is held out.
        test_rows: rows that only the final runs are judged on; without them they are judged on the validation rows,
            which have also chosen the rates.
        methods: names or configs; all of them by default.
        config: one budget for all. A `learning_rate` is every method's, and nothing is searched.
        preset: "quick", "default" or "thorough": see `spectune.comparing.schedule`.
        seeds: final runs of each method; by default the preset's.
        fractions: a data curve: shares of the rows (at most 1) or numbers of rows.
        metric: "auto", names or `package.module:function`, see `spectune.evaluation.Task`.
        generate_rows: judged rows that every final run writes a completion for.
        limits: of the user, for the recommendation; a resumption without any keeps those it began with.
        seed: of weights, data order and splits; default is the config's.
        output_dir, resume: default is the config's, else a new temporary folder; to go on there with what has ended.
        base_precision: what the frozen base's weights are stored in, see `spectune.load`.
        retain: a text file whose passages measure forgetting; default is text sampled from the base itself.
        choice_normalization: "sum", "token" or "byte", see `spectune.evaluation.Task`.
        origin: entries for config.yaml, the comparison's and each run's, see `train`.

    Raises:
        ConfigError, DataError: bad settings or data, or a folder to go on in whose runs had other settings, data or
            base; before anything is trained.
        DoesNotFitError: the plan says that no method fits into memory; before anything is trained. Where some fit,
            those that do not are among the failed runs.
        InterruptedRun: Ctrl-C or SIGTERM; `resume` goes on from there.

    A run that fails stays in the result with its reason, and the others go on.
    """
    phases = Phases()
    own: dict[str, Any] = {"preset": preset, "seeds": seeds, "fractions": list(fractions), "metric": metric}
    own |= {"generate_rows": generate_rows, "choice_normalization": choice_normalization}
    check_settings(**own)
    settings, folder, before = _begin(config, seed, output_dir, resume)
    arms = _arms(methods, base_precision)
    rows = phases.call("rows", Rows.read, train_rows, valid_rows, test_rows, settings)
    model, tokenizer = phases.call("load", _base, base, tokenizer, device, dtype, base_precision)
    _check_base(model, preset, named=isinstance(base, str | Path))
    recorded = _recorded(str(model.config._name_or_path), settings, arms, own, origin)
    settings = dated(_begun(settings, _max_length(model, arms, settings, before), before), tokenizer)
    judged: dict[str, Any] = {name: own[name] for name in ("metric", "generate_rows", "choice_normalization")}
    inputs = phases.call("rows", Inputs.of, rows, tokenizer, settings, vocab_size=vocabulary_rows(model), **judged)
    virtual = max(arm.method.virtual_tokens for arm in arms)
    text = phases.call("forget", retained_passages, model, tokenizer, retain, settings.seed, virtual_tokens=virtual)
    schedule = Schedule.of(PRESETS[preset], settings, *inputs.train_size, seeds=seeds, fractions=fractions)
    job = Job(folder, model, tokenizer, arms, settings, inputs, text, schedule, origin, console, phases)
    job.conditions = _checked(_conditions(job, retain), before, limits, folder)
    return _carry_out(job, recorded)


def _carry_out(job: Job, recorded: Mapping[str, Any]) -> Comparison:
    """Make all runs that are not there yet, and the comparison from all of them. `recorded`: for config.yaml."""
    folder, base = job.folder, job.conditions.base
    job.phases.add(job.conditions.seconds_by_phase)
    if not (folder / "config.yaml").is_file():  # what a resumption goes on with stays as it was
        atomic_write_text(folder / "config.yaml", yaml.safe_dump(dict(recorded), sort_keys=False))
    for line in (job.conditions.data.mixture, job.inputs.notice):
        if line:
            job.print(line)
    try:
        if base.judged_loss is None or not base_rows(job).is_file():
            judge_base(job)
        if base.valid_loss is None:
            # the judged rows are those, unless there are rows to test on
            base.valid_loss = base.judged_loss if job.inputs.rows.test is None else valid_loss_of_base(job)
        job.conditions.write(folder / conditions.FILE)
        runner = Runner(job)
        runner.run()
        if runner.has_run:  # what finds all runs there is none of their time
            job.record_time()
    except InterruptedRun as stop:  # what it says is of one run
        job.record_time()
        raise InterruptedRun(
            f"the comparison is in {folder}. To go on: the same command with --output-dir {folder} --resume"
        ) from stop
    comparison = Comparison.from_runs(folder)
    comparison.save()
    return comparison


def _checked(
    found: RecordedConditions, before: RecordedConditions | None, limits: Limits | None, folder: Path
) -> RecordedConditions:
    """Check that the conditions are those of an earlier call (`before`), take over what it measured of the base, and
    write them."""
    found.limits = limits or (before.limits if before is not None else Limits())
    if before is not None:
        found.seconds_by_phase = before.seconds_by_phase
        conditions.check(before, found, folder)
        found.base = Base(**{**found.base.to_dict(), **before.base.to_dict()})
        if before.metric_code not in (None, found.metric_code):
            # what was measured of rows is judged anew, from the weights that are kept
            for path in (folder / "base" / "rows.jsonl", *folder.glob("runs/*/*/rows.jsonl")):
                path.unlink(missing_ok=True)
    found.write(folder / conditions.FILE)
    return found


def _conditions(job: Job, retain: str | Path | None) -> RecordedConditions:
    """What all runs share; `identity` is what their results depend on."""
    model, settings, inputs, passages = job.model, job.config, job.inputs, job.passages
    name, family, dtype = base_name(model), describe(model), str(model.dtype).removeprefix("torch.")
    base = {"name": name, "total_parameters": family.num_parameters, "device": str(model.device), "dtype": dtype}
    if (precision := precision_of(model)) is not None:
        base["precision"] = precision
    return RecordedConditions(
        base=Base(**base),
        fingerprint=fingerprint(model, family),
        data=Data(
            **inputs.describe(),
            retained_passages=len(passages),
            retained_tokens=sum(map(len, passages)),
            retained_from=str(retain) if retain is not None else "sampled from the base at temperature 1",
            target_tokens_per_step=job.schedule.target_tokens_per_step,
        ),
        settings=settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        preset=job.schedule.record(len(inputs.valid.examples)),
        environment=environment(),
        scale=reference_shares([arm.method for arm in job.arms]),
        arms=[arm.record() for arm in job.arms],
        identity={
            **settings.model_dump(mode="json", exclude=NOT_SHARED),
            "base": [name, family.num_parameters, dtype, *([precision] if precision else [])],
            **inputs.identity(),
            "passages_sha256": hashlib.sha256(repr(passages).encode()).hexdigest(),
        },
        metric_code=[metric.code_sha256 for metric in inputs.task.custom],
    )


def check_settings(
    *, preset: str, seeds: int | None, fractions: Sequence[float], metric: str, generate_rows: int,
    choice_normalization: str = "sum",
) -> None:  # fmt: skip
    """Check a comparison's own settings, before anything is read. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}; expected one of {', '.join(PRESETS)}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds = {seeds}; expected at least 1 final run of each method")
    if generate_rows < 0:
        raise ConfigError(f"generate_rows = {generate_rows}; expected 0 (write nothing) or more")
    if choice_normalization not in CHOICE_NORMALIZATIONS:
        expected = f"expected one of {', '.join(CHOICE_NORMALIZATIONS)}"
        raise ConfigError(f"choice_normalization {choice_normalization!r}; {expected}")
    if wrong := [f"{f:g}" for f in fractions if not 0 < f < math.inf or (f > 1 and f != int(f))]:
        expected = "expected shares of the rows above 0 and up to 1, or whole numbers of rows"
        raise ConfigError(f"fractions {', '.join(wrong)}; {expected}")


def _begin(
    config: TrainingConfig | None, seed: int | None, output_dir: str | Path | None, resume: bool
) -> tuple[TrainingConfig, Path, RecordedConditions | None]:
    """The settings of all runs, the folder, and the conditions of an earlier call that lie in it."""
    settings = config or TrainingConfig()
    folder = _folder(output_dir if output_dir is not None else settings.output_dir, resume or settings.resume)
    before = conditions.read(folder) if (folder / conditions.FILE).is_file() else None
    seed = settings.seed if seed is None else seed
    return settings.model_copy(update={"seed": seed, "resume": False, "output_dir": None}), folder, before


def _begun(settings: TrainingConfig, max_length: int, before: RecordedConditions | None) -> TrainingConfig:
    """The settings with the length of rows, and with the date of the day on which the comparison began, where chat
    templates saw one."""
    recorded = before.identity.get("template_date") if before is not None else None
    date = settings.template_date or (datetime.date.fromisoformat(recorded) if recorded else None)
    return settings.model_copy(update={"max_length": max_length, "template_date": date})


def _folder(given: str | Path | None, resume: bool) -> Path:
    if resume and given is None:
        raise ConfigError("resume needs an output_dir: there is nothing to go on from")
    folder = Path(given) if given is not None else Path(tempfile.mkdtemp(prefix="spectune-compare-"))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder, or a name that is free")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise ConfigError(f"{folder} is not empty: give another --output-dir, or --resume to go on there")
    other = [name for name in OF_OTHER_RUNS if (folder / name).exists()]
    if other and not (folder / conditions.FILE).is_file():
        raise ConfigError(
            f"{folder} holds {', '.join(other)} and no {conditions.FILE}: a single run, or a comparison of an earlier "
            "version, so nothing says under which conditions it was made. Give another --output-dir."
        )
    return folder


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
    """The same tokens of every row for all: as many as the method with the most virtual tokens leaves room for; where
    a comparison goes on with other methods, as many as it began with, if they leave room for that."""
    length = min(max_length(model, arm.method, settings) for arm in arms)
    if before is None or settings.max_length is not None:
        return length
    return min(length, int(before.identity["max_length"]))


def _recorded(
    name: str, settings: TrainingConfig, arms: Sequence[Arm], own: Mapping[str, Any], origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The comparison's config.yaml: what `--resume` reads where the command line says nothing."""
    return {
        "model": name,
        **(origin or {}),
        "methods": [arm.method.name for arm in arms],
        **{key: value for key, value in own.items() if value not in (None, [])},
        **settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        **{arm.method.name: arm.method.model_dump(mode="json", exclude={"name"}) for arm in arms},
    }


def _base(
    base: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: str, dtype: str,
    precision: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    if isinstance(base, PreTrainedModel) and tokenizer is not None and precision is None:
        return base, tokenizer
    model, own = load(base, device=device, dtype=dtype, base_precision=precision)
    return model, tokenizer or own


def _arms(methods: Sequence[str | Method] | None, precision: str | None) -> list[Arm]:
    """Each method under a name for its runs: its own, with a number where one comes twice."""
    wanted: Sequence[str | Method] = methods if methods is not None else list(BY_NAME)
    if not wanted:
        raise ConfigError(f"no method to compare; expected some of {', '.join(BY_NAME)}, or their configs")
    arms: list[Arm] = []
    for given in wanted:
        method = method_from_name(given) if isinstance(given, str) else given
        same = sum(arm.method.name == method.name for arm in arms)
        arms.append(Arm(method.name if same == 0 else f"{method.name}-{same + 1}", method))
    trained = [arm.name for arm in arms if arm.method.trains_base]
    if precision is not None and trained:
        raise ConfigError(
            f"base_precision = {precision} is for methods that leave the base frozen, and {', '.join(trained)} trains "
            "the base's own weights: leave it out of methods, or compare without base_precision"
        )
    return arms
