"""Run the methods one after another on one base, under one budget, and measure each in the same way."""

from __future__ import annotations

import hashlib
import logging
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing.comparison import Comparison
from spectune.comparing.measure import measure, retained_passages
from spectune.data import Row, load_rows, split_rows
from spectune.deltas import Method, attach, attached, detach
from spectune.errors import ConfigError, InterruptedRun, SpectuneError
from spectune.families import describe, fingerprint
from spectune.methods import BY_NAME, method_from_name
from spectune.planning import reference_shares
from spectune.storage import atomic_write_text, base_name, load
from spectune.training import RunResult, TrainingConfig, train
from spectune.training.identity import OtherRunError, check_identity, read_identity
from spectune.training.prepare import prepare

log = logging.getLogger("spectune")

VALID_SHARE = 0.1


def compare(
    base: str | Path | PreTrainedModel,
    train_rows: Any,
    valid_rows: Any = None,
    *,
    methods: Sequence[str | Method] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    config: TrainingConfig | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    retain: str | Path | None = None,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Comparison:
    """Train every method on the same rows, steps and batches, and measure them side by side.

    Args:
        base: a loaded model, a hub id, a folder, or "spectune-tiny".
        train_rows, valid_rows: paths, lists of dicts, or `datasets` objects; without `valid_rows` a seeded tenth of
            the training rows is held out.
        methods: names or configs; all of them by default.
        config: one budget for all; a `learning_rate` of None is each method's own default.
        seed: of weights, data order and splits; default is the config's.
        output_dir: default is the config's, else a new temporary folder.
        retain: a text file whose passages measure forgetting; default is text sampled from the base itself.
        resume: go on in `output_dir`: runs that ended are not run again.
        origin: entries for config.yaml, the comparison's and each run's, see `train`.

    Raises:
        ConfigError, DataError: bad settings or data, or a folder to go on in whose runs had other settings, data or
            base; before anything is trained.
        InterruptedRun: Ctrl-C or SIGTERM; `resume` goes on from there.

    A run that fails stays in the result with its reason, and the others go on.
    """
    settings = config or TrainingConfig()
    seed = settings.seed if seed is None else seed
    resume = resume or settings.resume
    output_dir = output_dir if output_dir is not None else settings.output_dir
    settings = settings.model_copy(update={"seed": seed, "resume": resume})
    wanted: Sequence[str | Method] = methods if methods is not None else list(BY_NAME)
    chosen = [method_from_name(m) if isinstance(m, str) else m for m in wanted]
    names = _run_names(chosen)
    if resume and output_dir is None:
        raise ConfigError("resume needs an output_dir: there is nothing to go on from")
    folder = Path(output_dir) if output_dir is not None else Path(tempfile.mkdtemp(prefix="spectune-compare-"))
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise ConfigError(f"{folder} is not empty: give another --output-dir, or --resume to go on there")
    rows, valid, held_out = _rows(train_rows, valid_rows, seed, settings)
    model, tokenizer = _base(base, tokenizer, device, dtype)
    if attached(model):
        raise ConfigError(f"the model has deltas attached already ({', '.join(attached(model))}): detach them first")
    passages = retained_passages(model, tokenizer, retain, seed)
    job = _Job(model, tokenizer, rows, valid, passages, origin, console)
    for name, method in zip(names, chosen, strict=True):
        job.check_ended(method, settings.model_copy(update={"output_dir": folder / "runs" / name}))

    config_file = folder / "config.yaml"
    if not config_file.is_file():  # what a resumption goes on with stays as it was
        atomic_write_text(config_file, yaml.safe_dump(_recorded(model, settings, chosen, origin), sort_keys=False))
    results: list[RunResult] = []
    failed: list[dict[str, Any]] = []
    for name, method in zip(names, chosen, strict=True):
        try:
            results.append(job.run(name, method, settings.model_copy(update={"output_dir": folder / "runs" / name})))
        except InterruptedRun as stop:
            raise InterruptedRun(f"{stop}\nTo go on with the comparison: the same command with --resume") from None
        except SpectuneError as error:
            if console is None:  # who gave a console tells of failures in their own words
                log.warning("%s failed: %s", name, error)
            failed.append({"method": name, "label": method.label, "reason": str(error)})
        finally:
            for delta in attached(model):
                detach(model, delta)

    rates = [rate for result in results if (rate := result.decode_tokens_per_second_base) is not None]
    content: dict[str, Any] = {
        "base": {
            "name": base_name(model),
            "total_parameters": sum(p.numel() for p in model.parameters()),
            "valid_loss": next((r.base_valid_loss for r in results), None),
            "decode_tokens_per_second": statistics.median(rates) if rates else None,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "data": {
            "train_rows": len(rows),
            "valid_rows": len(valid),
            "held_out": held_out,
            "retained_passages": len(passages),
            "retained_tokens": sum(map(len, passages)),
            "retained_from": str(retain) if retain is not None else "sampled from the base at temperature 1",
        },
        "settings": settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        "scale": reference_shares(chosen),
        "runs": [
            {**result.model_dump(mode="json"), "label": method.label, "best_for": method.best_for}
            for result in results
            for name, method in zip(names, chosen, strict=True)
            if name == result.name
        ],
        "failed": failed,
        "verdict": None,  # one seed and one learning rate a method cannot carry one
    }
    comparison = Comparison(folder, content)
    comparison.save()
    return comparison


@dataclass(frozen=True)
class _Job:
    """What all runs of a comparison share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    valid: list[Row]
    passages: list[list[int]]
    origin: Mapping[str, Any] | None
    console: Console | None

    @property
    def passages_sha256(self) -> str:
        return hashlib.sha256(repr(self.passages).encode()).hexdigest()

    def check_ended(self, method: Method, config: TrainingConfig) -> None:
        """Raise OtherRunError where the run's folder holds a finished run that had another identity."""
        assert config.output_dir is not None
        path = config.output_dir / "result.json"
        if not path.is_file():
            return
        base = fingerprint(self.model, describe(self.model))
        prepared = prepare(self.model, self.tokenizer, method, self.rows, self.valid, config, base)
        check_identity(read_identity(config.output_dir), prepared.identity, config.output_dir, "finished run")
        measured_on = RunResult.load(path).retained_sha256
        if measured_on not in (None, self.passages_sha256):
            raise OtherRunError(
                f"{config.output_dir} was measured on other passages (--retain, or another seed): its forgetting would "
                "not compare with that of the others. Give the same ones, or start in a new folder."
            )

    def run(self, name: str, method: Method, config: TrainingConfig) -> RunResult:
        """Train, or take what a finished run left, and measure what has not been measured."""
        model, tokenizer = self.model, self.tokenizer
        delta = attach(model, method, name, tokenizer=tokenizer, seed=config.seed, keep_base=method.trains_base)
        # a finished run gives the delta its trained weights, and its own result
        result = train(model, tokenizer, delta, self.rows, self.valid, config, origin=self.origin, console=self.console)
        if result.retained_sha256 is not None:
            return result
        assert config.output_dir is not None
        found = measure(model, tokenizer, delta, config.output_dir / "best", self.passages)
        result = result.model_copy(update={"name": name, "retained_sha256": self.passages_sha256, **found})
        result.save(config.output_dir / "result.json")
        return result


def _recorded(
    model: PreTrainedModel, settings: TrainingConfig, methods: Sequence[Method], origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The comparison's config.yaml: what `--resume` reads where the command line says nothing."""
    return {
        "model": str(model.config._name_or_path),
        **(origin or {}),
        "methods": [method.name for method in methods],
        **settings.model_dump(mode="json", exclude={"output_dir", "resume"}),
        **{method.name: method.model_dump(mode="json", exclude={"name"}) for method in methods},
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


def _run_names(methods: Sequence[Method]) -> list[str]:
    """A folder name for each: the method's, with a number where one comes twice."""
    names: list[str] = []
    for method in methods:
        same = sum(other.name == method.name for other in methods[: len(names)])
        names.append(method.name if same == 0 else f"{method.name}-{same + 1}")
    return names
