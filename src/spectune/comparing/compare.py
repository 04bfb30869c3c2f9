"""Compare methods on one base and one data set: search, repeat, measure, judge, recommend."""

from __future__ import annotations

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
from spectune.comparing.advising.limits import Limits
from spectune.comparing.comparison import Comparison
from spectune.comparing.inputs import Inputs, Rows
from spectune.comparing.job import Arm, Job
from spectune.comparing.measure import retained_passages
from spectune.comparing.presets import PRESETS
from spectune.comparing.runner import Runner
from spectune.comparing.schedule import Schedule
from spectune.data import Encoded
from spectune.deltas import Method, attached, base_name
from spectune.errors import ConfigError, InterruptedRun
from spectune.evaluation import row_losses
from spectune.families import base_precision as precision_of
from spectune.families import describe, fingerprint
from spectune.methods import BY_NAME, method_from_name
from spectune.planning import reference_shares
from spectune.storage import TINY, atomic_write_text, load
from spectune.training import TrainingConfig, environment
from spectune.training.identity import FREE
from spectune.training.prepare import max_length, pad_token_id

GENERATE_ROWS = 64
#: settings that no result depends on (speed and memory do on recomputation), and the one that differs between its runs
NOT_SHARED = (FREE - {"gradient_checkpointing"}) | {"learning_rate"}
#: what a folder holds where something else than a comparison that can be gone on with lies in it
OF_OTHER_RUNS = ("comparison.json", "result.json", "identity.json", "runs")


def compare(
    base: str | Path | PreTrainedModel,
    train_rows: Any,
    valid_rows: Any = None,
    *,
    test_rows: Any = None,
    methods: Sequence[str | Method] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    config: TrainingConfig | None = None,
    preset: str = "default",
    seeds: int | None = None,
    fractions: Sequence[float] = (),
    metric: str = "auto",
    generate_rows: int = GENERATE_ROWS,
    limits: Limits | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    base_precision: str | None = None,
    retain: str | Path | None = None,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Comparison:
    """Search each method's learning rate, train it with several seeds, measure all alike, and say what differs.

    Args:
        base: a loaded model, a hub id, a folder, or "spectune-tiny".
        train_rows, valid_rows: paths, lists of dicts, or `datasets` objects; without `valid_rows` a seeded tenth of
            the training rows is held out.
        test_rows: rows that only the final runs are judged on; without them they are judged on the validation rows,
            which have also chosen the rates.
        methods: names or configs; all of them by default.
        config: one budget for all. A `learning_rate` is every method's, and nothing is searched.
        preset: "quick", "default" or "thorough": see `spectune.comparing.presets`.
        seeds: final runs of each method; by default the preset's.
        fractions: a data curve: shares of the rows (at most 1) or numbers of rows.
        metric: "auto", names or `package.module:function`, see `spectune.evaluation.Task`.
        generate_rows: judged rows that every final run writes a completion for.
        limits: of the user, for the recommendation; a resumption without any keeps those it began with.
        seed: of weights, data order and splits; default is the config's.
        output_dir: default is the config's, else a new temporary folder.
        base_precision: what the frozen base's weights are stored in, see `spectune.load`.
        retain: a text file whose passages measure forgetting; default is text sampled from the base itself.
        resume: go on in `output_dir`: runs that ended are not run again.
        origin: entries for config.yaml, the comparison's and each run's, see `train`.

    Raises:
        ConfigError, DataError: bad settings or data, or a folder to go on in whose runs had other settings, data or
            base; before anything is trained.
        DoesNotFitError: the plan says that no method fits into memory; before anything is trained. Where some fit,
            those that do not are among the failed runs.
        InterruptedRun: Ctrl-C or SIGTERM; `resume` goes on from there.

    A run that fails stays in the result with its reason, and the others go on.
    """
    settings = config or TrainingConfig()
    seed = settings.seed if seed is None else seed
    folder = _folder(output_dir if output_dir is not None else settings.output_dir, resume or settings.resume)
    before = conditions.read(folder) if (folder / conditions.FILE).is_file() else None
    asked: dict[str, Any] = {
        "preset": preset,
        "seeds": seeds,
        "fractions": list(fractions),
        "metric": metric,
        "generate_rows": generate_rows,
    }
    check_settings(**asked)
    arms = _arms(methods)
    settings = settings.model_copy(update={"seed": seed, "resume": False, "output_dir": None})
    rows = Rows.read(train_rows, valid_rows, test_rows, settings)
    _check_frozen(arms, base_precision)
    model, tokenizer = _base(base, tokenizer, device, dtype, base_precision)
    _check_base(model, preset, named=isinstance(base, str | Path))
    recorded = _recorded(model, settings, arms, asked, origin)
    settings = settings.model_copy(update={"max_length": _max_length(model, arms, settings, before)})
    inputs = Inputs.of(rows, tokenizer, settings, metric=metric, generate_rows=generate_rows)
    virtual_tokens = max(arm.method.virtual_tokens for arm in arms)
    passages = retained_passages(model, tokenizer, retain, seed, virtual_tokens=virtual_tokens)
    targets = sum(example.target_tokens for example in inputs.train.examples)
    schedule = Schedule.of(
        PRESETS[preset], settings, len(inputs.train.examples), targets, seeds=seeds, fractions=fractions
    )
    found = _conditions(model, arms, settings, inputs, passages, schedule, retain)
    if limits is None and before is not None:
        limits = Limits(**before["limits"])
    found["limits"] = (limits or Limits()).model_dump(mode="json", exclude_none=True)
    if before is not None:
        conditions.check(before, found, folder)
        found["base"] = {**found["base"], **before["base"]}
        if before.get("metric_code", found["metric_code"]) != found["metric_code"]:
            _forget_rows(folder)
    conditions.write(folder, found)
    config_file = folder / "config.yaml"
    if not config_file.is_file():  # what a resumption goes on with stays as it was
        atomic_write_text(config_file, yaml.safe_dump(recorded, sort_keys=False))
    if inputs.notice:
        (console or Console()).print(inputs.notice, soft_wrap=True, highlight=False, markup=False)

    try:
        job = Job(
            folder=folder,
            model=model,
            tokenizer=tokenizer,
            train=inputs.train,
            valid=inputs.valid,
            task=inputs.task,
            judged_on=rows.judged_on,
            passages=passages,
            config=settings,
            identity=found["identity"],
            base_valid_loss=_base_valid_loss(found["base"], model, tokenizer, inputs.valid, settings),
            final_steps=schedule.final_steps,
            own_process=schedule.preset.own_process,
            origin=origin,
            console=console,
        )
        if "judged_loss" not in found["base"] or not job.base_rows.is_file():
            found["base"] |= job.judge_base()
        found["base"]["valid_loss"] = job.base_valid_loss
        conditions.write(folder, found)
        Runner(job, schedule, arms, console).run()
    except InterruptedRun as stop:  # what it says is of one run
        raise InterruptedRun(
            f"the comparison is in {folder}. To go on: the same command with --output-dir {folder} --resume"
        ) from stop
    comparison = Comparison.from_runs(folder)
    comparison.save()
    return comparison


def check_settings(
    *, preset: str, seeds: int | None, fractions: Sequence[float], metric: str, generate_rows: int
) -> None:
    """What can be said of a comparison's own settings before anything is read. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}; expected one of {', '.join(PRESETS)}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds = {seeds}; expected at least 1 final run of each method")
    if generate_rows < 0:
        raise ConfigError(f"generate_rows = {generate_rows}; expected 0 (write nothing) or more")
    wrong = [f for f in fractions if not 0 < f < math.inf or (f > 1 and f != int(f))]
    if wrong:
        raise ConfigError(
            f"fractions {', '.join(f'{f:g}' for f in wrong)}; expected shares of the rows above 0 and up to 1, or "
            "whole numbers of rows"
        )


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


def _check_frozen(arms: Sequence[Arm], precision: str | None) -> None:
    trained = [arm.name for arm in arms if arm.method.trains_base]
    if precision is not None and trained:
        raise ConfigError(
            f"base_precision = {precision} is for methods that leave the base frozen, and {', '.join(trained)} trains "
            "the base's own weights: leave it out of methods, or compare without base_precision"
        )


def _check_base(model: PreTrainedModel, preset: str, *, named: bool) -> None:
    if PRESETS[preset].own_process and not (named or base_name(model) == TINY):
        raise ConfigError(
            f"preset {preset} loads the base anew in processes of its own: name it, instead of giving a model"
        )
    if attached(model):
        raise ConfigError(f"the model has deltas attached already ({', '.join(attached(model))}): detach them first")


def _max_length(
    model: PreTrainedModel, arms: Sequence[Arm], settings: TrainingConfig, before: Mapping[str, Any] | None
) -> int:
    """The same tokens of every row for all: as many as the method with the most virtual tokens leaves room for; where
    a comparison goes on with other methods, as many as it began with, if they leave room for that."""
    length = min(max_length(model, arm.method, settings) for arm in arms)
    if before is None or settings.max_length is not None:
        return length
    return min(length, int(before["identity"]["max_length"]))


def _conditions(
    model: PreTrainedModel,
    arms: Sequence[Arm],
    settings: TrainingConfig,
    inputs: Inputs,
    passages: list[list[int]],
    schedule: Schedule,
    retain: str | Path | None,
) -> dict[str, Any]:
    """What all runs share, for `conditions.json`; `identity` is what their results depend on."""
    base = {
        "name": base_name(model),
        "total_parameters": describe(model).num_parameters,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if (precision := precision_of(model)) is not None:
        base["precision"] = precision
    return {
        "base": base,
        "fingerprint": fingerprint(model, describe(model)),
        "data": {
            **inputs.describe(),
            "retained_passages": len(passages),
            "retained_tokens": sum(map(len, passages)),
            "retained_from": str(retain) if retain is not None else "sampled from the base at temperature 1",
            "target_tokens_per_step": schedule.target_tokens_per_step,
        },
        "settings": settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        "preset": schedule.to_dict(len(inputs.valid.examples)),
        "environment": environment(),
        "scale": reference_shares([arm.method for arm in arms]),
        "arms": [
            {
                "name": arm.name,
                "method": arm.method.name,
                "label": arm.method.label,
                "best_for": arm.method.best_for,
                "settings": arm.method.model_dump(mode="json"),
            }
            for arm in arms
        ],
        "identity": {
            **settings.model_dump(mode="json", exclude=NOT_SHARED),
            "base": [base["name"], base["total_parameters"], base["dtype"], *([precision] if precision else [])],
            **inputs.identity(),
            "passages_sha256": hashlib.sha256(repr(passages).encode()).hexdigest(),
        },
        # no part of the identity: where it has changed, runs are judged again, and not trained again
        "metric_code": [metric.code_sha256 for metric in inputs.task.custom],
    }


def _forget_rows(folder: Path) -> None:
    """Remove what was measured of rows: what is missing is judged anew, from the weights that are kept."""
    for path in (folder / "base" / "rows.jsonl", *folder.glob("runs/*/*/rows.jsonl")):
        path.unlink(missing_ok=True)


def _base_valid_loss(
    known: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    valid: Encoded,
    settings: TrainingConfig,
) -> float:
    if "valid_loss" in known:
        return float(known["valid_loss"])
    return row_losses(
        model, valid.examples, pad_token_id(tokenizer), settings.per_device_eval_batch_size
    ).mean_per_token


def _recorded(
    model: PreTrainedModel,
    settings: TrainingConfig,
    arms: Sequence[Arm],
    asked: Mapping[str, Any],
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The comparison's config.yaml: what `--resume` reads where the command line says nothing."""
    return {
        "model": str(model.config._name_or_path),
        **(origin or {}),
        "methods": [arm.method.name for arm in arms],
        **{key: value for key, value in asked.items() if value not in (None, [])},
        **settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        **{arm.method.name: arm.method.model_dump(mode="json", exclude={"name"}) for arm in arms},
    }


def _base(
    base: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str,
    dtype: str,
    precision: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(base, PreTrainedModel) and tokenizer is not None and precision is None:
        return base, tokenizer
    model, own = load(base, device=device, dtype=dtype, base_precision=precision)
    return model, tokenizer or own


def _arms(methods: Sequence[str | Method] | None) -> list[Arm]:
    """Each method under a name for its runs: its own, with a number where one comes twice."""
    wanted: Sequence[str | Method] = methods if methods is not None else list(BY_NAME)
    if not wanted:
        raise ConfigError(f"no method to compare; expected some of {', '.join(BY_NAME)}, or their configs")
    arms: list[Arm] = []
    for given in wanted:
        method = method_from_name(given) if isinstance(given, str) else given
        same = sum(arm.method.name == method.name for arm in arms)
        arms.append(Arm(method.name if same == 0 else f"{method.name}-{same + 1}", method))
    return arms
