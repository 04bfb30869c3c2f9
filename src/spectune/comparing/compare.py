"""Compare methods on one base and one data set: search, repeat, measure, judge, recommend."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing import conditions
from spectune.comparing.comparison import Comparison
from spectune.comparing.job import Arm, Job
from spectune.comparing.limits import Limits
from spectune.comparing.measure import retained_passages
from spectune.comparing.presets import PRESETS
from spectune.comparing.runner import Runner
from spectune.comparing.schedule import Schedule
from spectune.data import Row, encode, load_rows, split_rows
from spectune.deltas import Method, attached
from spectune.errors import ConfigError, InterruptedRun
from spectune.evaluation import Task, row_losses
from spectune.methods import BY_NAME, method_from_name
from spectune.planning import reference_shares
from spectune.storage import TINY, atomic_write_text, base_name, load
from spectune.training import TrainingConfig, environment
from spectune.training.prepare import max_length
from spectune.training.train import pad_token_id

VALID_SHARE = 0.1
GENERATE_ROWS = 64
#: settings that no result depends on, and those that differ between the runs of a comparison
NOT_SHARED = {"output_dir", "resume", "learning_rate", "logging_steps", "report_to", "memory_check"}


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
        limits: of the user, for the recommendation.
        seed: of weights, data order and splits; default is the config's.
        output_dir: default is the config's, else a new temporary folder.
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
    resume = resume or settings.resume
    folder = _folder(output_dir if output_dir is not None else settings.output_dir, resume)
    asked: dict[str, Any] = {
        "preset": preset,
        "seeds": seeds,
        "fractions": list(fractions),
        "metric": metric,
        "generate_rows": generate_rows,
    }
    _check(**asked)
    arms = _arms(methods)
    settings = settings.model_copy(update={"seed": seed, "resume": False, "output_dir": None})
    rows, valid, held_out = _rows(train_rows, valid_rows, seed, settings)
    test = None if test_rows is None else load_rows(test_rows, skip_bad_rows=settings.skip_bad_rows)
    model, tokenizer = _base(base, tokenizer, device, dtype)
    if PRESETS[preset].own_process and not (base_name(model) == TINY or isinstance(base, str | Path)):
        raise ConfigError(
            "preset thorough loads the base anew in processes of its own: name it, instead of giving a model"
        )
    if attached(model):
        raise ConfigError(f"the model has deltas attached already ({', '.join(attached(model))}): detach them first")
    recorded = _recorded(model, settings, arms, asked, origin)
    # the same tokens of every row for all: as many as the method with the most virtual tokens leaves room for
    settings = settings.model_copy(update={"max_length": min(max_length(model, arm.method, settings) for arm in arms)})
    assert settings.max_length is not None
    encoded, held = (
        encode(part, tokenizer, max_length=settings.max_length, separator=settings.separator) for part in (rows, valid)
    )
    task = Task.of(
        valid if test is None else test,
        train_rows=rows,
        metric=metric,
        generate_rows=generate_rows,
        batch_size=settings.per_device_eval_batch_size,
        max_length=settings.max_length,
        separator=settings.separator,
    )
    passages = retained_passages(model, tokenizer, retain, seed)
    targets = sum(example.target_tokens for example in encoded.examples)
    schedule = Schedule.of(PRESETS[preset], settings, len(encoded.examples), targets, seeds=seeds, fractions=fractions)
    found: dict[str, Any] = {
        "base": {
            "name": base_name(model),
            "total_parameters": sum(p.numel() for p in model.parameters()),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "data": {
            "train_rows": len(rows),
            "train_examples": len(encoded.examples),
            "valid_rows": len(valid),
            "held_out": held_out,
            "judged_on": "valid" if test is None else "test",
            "judged_rows": len(task.rows),
            "generated_rows": len(task.to_write),
            "task": task.describe(),
            "retained_passages": len(passages),
            "retained_tokens": sum(map(len, passages)),
            "retained_from": str(retain) if retain is not None else "sampled from the base at temperature 1",
            "target_tokens_per_step": schedule.target_tokens_per_step,
        },
        "settings": settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        "preset": schedule.to_dict(len(held.examples)),
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
        "limits": (limits or Limits()).model_dump(mode="json", exclude_none=True),
    }
    found["identity"] = identity = {
        **settings.model_dump(mode="json", exclude=NOT_SHARED),
        "base": [found["base"]["name"], found["base"]["total_parameters"], found["base"]["dtype"]],
        "data_sha256": conditions.key(encoded.sha256, held.sha256),
        "judged_rows_sha256": conditions.key([(r.prompt, r.completion, r.text, r.messages) for r in task.rows]),
        "judged": task.conditions(),
        "passages_sha256": hashlib.sha256(repr(passages).encode()).hexdigest(),
    }
    before = conditions.read(folder) if (folder / conditions.FILE).is_file() else None
    if before is not None:
        conditions.check(before, found, folder)
        found["base"] = {**found["base"], **before["base"]}
    conditions.write(folder, found)
    config_file = folder / "config.yaml"
    if not config_file.is_file():  # what a resumption goes on with stays as it was
        atomic_write_text(config_file, yaml.safe_dump(recorded, sort_keys=False))

    if "valid_loss" not in found["base"]:
        pad, size = pad_token_id(tokenizer), settings.per_device_eval_batch_size
        found["base"]["valid_loss"] = row_losses(model, held.examples, pad, size).mean_per_token
    job = Job(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        train=encoded,
        valid=held,
        task=task,
        judged_on=found["data"]["judged_on"],
        passages=passages,
        config=settings,
        identity=identity,
        base_valid_loss=found["base"]["valid_loss"],
        measured_seed=schedule.seeds[0],
        own_process=schedule.preset.own_process,
        origin=origin,
        console=console,
    )
    if "judged_loss" not in found["base"]:
        found["base"] |= job.judge_base()
    conditions.write(folder, found)
    try:
        Runner(job, schedule, arms, console).run()
    except InterruptedRun as stop:
        raise InterruptedRun(f"{stop}\nTo go on with the comparison: the same command with --resume") from None
    comparison = Comparison.from_runs(folder)
    comparison.save()
    return comparison


def _check(preset: str, seeds: int | None, fractions: Sequence[float], metric: str, generate_rows: int) -> None:
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}; expected one of {', '.join(PRESETS)}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds = {seeds}; expected at least 1 final run of each method")
    if generate_rows < 0:
        raise ConfigError(f"generate_rows = {generate_rows}; expected 0 (write nothing) or more")
    wrong = [f for f in fractions if f <= 0 or (f > 1 and f != int(f))]
    if wrong:
        raise ConfigError(
            f"fractions {', '.join(f'{f:g}' for f in wrong)}; expected shares of the rows above 0 and up to 1, or "
            "whole numbers of rows"
        )


def _folder(given: str | Path | None, resume: bool) -> Path:
    if resume and given is None:
        raise ConfigError("resume needs an output_dir: there is nothing to go on from")
    folder = Path(given) if given is not None else Path(tempfile.mkdtemp(prefix="spectune-compare-"))
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise ConfigError(f"{folder} is not empty: give another --output-dir, or --resume to go on there")
    return folder


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
    base: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(base, PreTrainedModel) and tokenizer is not None:
        return base, tokenizer
    model, own = load(base, device=device, dtype=dtype)
    return model, tokenizer or own


def _rows(
    train_rows: Any, valid_rows: Any, seed: int, settings: TrainingConfig
) -> tuple[list[Row], list[Row], float | None]:
    rows = load_rows(train_rows, skip_bad_rows=settings.skip_bad_rows)
    if valid_rows is not None:
        return rows, load_rows(valid_rows, skip_bad_rows=settings.skip_bad_rows), None
    kept, held = split_rows(rows, share=VALID_SHARE, seed=seed)
    return kept, held, VALID_SHARE


def _arms(methods: Sequence[str | Method] | None) -> list[Arm]:
    """Each method under a name for its runs: its own, with a number where one comes twice."""
    wanted: Sequence[str | Method] = methods if methods is not None else list(BY_NAME)
    arms: list[Arm] = []
    for given in wanted:
        method = method_from_name(given) if isinstance(given, str) else given
        same = sum(arm.method.name == method.name for arm in arms)
        arms.append(Arm(method.name if same == 0 else f"{method.name}-{same + 1}", method))
    return arms
