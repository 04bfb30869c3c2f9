"""Run the methods one after another on one base, under one budget, and measure each in the same way."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing.comparison import Comparison
from spectune.comparing.measure import measure, retained_passages
from spectune.data import Row, load_rows, split_rows
from spectune.deltas import Method, attach, attached, detach
from spectune.errors import ConfigError, InterruptedRun, SpectuneError
from spectune.methods import BY_NAME, method_from_name
from spectune.planning import reference_shares
from spectune.storage import load
from spectune.training import RunResult, TrainingConfig, train

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
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    retain: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Train every method on the same rows, steps and batches, and measure them side by side.

    Args:
        base: a loaded model, a hub id, a folder, or "spectune-tiny".
        train_rows, valid_rows: paths, lists of dicts, or `datasets` objects; without `valid_rows` a seeded tenth of
            the training rows is held out.
        methods: names or configs; all of them by default.
        config: one budget for all; a `learning_rate` of None is each method's own default.
        output_dir: default is a new temporary folder.
        retain: a text file whose passages measure forgetting; default is text sampled from the base itself.
        resume: go on in `output_dir`: runs that ended are not run again.

    Raises:
        ConfigError, DataError: bad settings or data, before anything is trained.
        InterruptedRun: Ctrl-C or SIGTERM; `resume` goes on from there.

    A run that fails stays in the result with its reason, and the others go on.
    """
    settings = (config or TrainingConfig()).model_copy(update={"seed": seed})
    wanted: Sequence[str | Method] = methods if methods is not None else list(BY_NAME)
    chosen = [method_from_name(m) if isinstance(m, str) else m for m in wanted]
    names = _run_names(chosen)
    folder = Path(output_dir) if output_dir is not None else Path(tempfile.mkdtemp(prefix="spectune-compare-"))
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise ConfigError(f"{folder} is not empty: give another --output-dir, or --resume to go on there")
    rows, valid, held_out = _rows(train_rows, valid_rows, seed, settings)
    model, own_tokenizer = load(base, device=device, dtype=dtype)
    tokenizer = tokenizer or own_tokenizer
    if attached(model):
        raise ConfigError(f"the model has deltas attached already ({', '.join(attached(model))}): detach them first")
    passages = retained_passages(base, model, tokenizer, retain, seed)

    results: list[RunResult] = []
    failed: list[dict[str, Any]] = []
    for name, method in zip(names, chosen, strict=True):
        place = folder / "runs" / name
        ended = _ended(place) if resume else None
        if ended is None:
            try:
                run = settings.model_copy(update={"output_dir": place, "resume": resume})
                ended = _run(model, tokenizer, method, name, rows, valid, run, passages, console)
            except InterruptedRun as stop:
                raise InterruptedRun(f"{stop}\nTo go on with the comparison: the same command with --resume") from None
            except SpectuneError as error:
                log.warning("%s failed: %s", name, error)
                failed.append({"method": name, "label": method.label, "reason": str(error)})
                continue
            finally:
                for delta in attached(model):
                    detach(model, delta)
            ended.save(place / "result.json")
        results.append(ended)

    rates = [rate for result in results if (rate := result.decode_tokens_per_second_base) is not None]
    content: dict[str, Any] = {
        "base": {
            "name": str(base) if not isinstance(base, PreTrainedModel) else str(base.config._name_or_path),
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


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    name: str,
    rows: list[Row],
    valid: list[Row],
    config: TrainingConfig,
    passages: list[list[int]],
    console: Console | None,
) -> RunResult:
    delta = attach(model, method, name, tokenizer=tokenizer, seed=config.seed, keep_base=method.trains_base)
    result = train(model, tokenizer, delta, rows, valid, config, console=console)
    assert config.output_dir is not None
    found = measure(model, tokenizer, delta, Path(config.output_dir) / "best", passages)
    return result.model_copy(update={"name": name, **found})


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


def _ended(place: Path) -> RunResult | None:
    """The result of a run that ended, measurements included."""
    path = place / "result.json"
    if not path.is_file():
        return None
    result = RunResult.load(path)
    return result if result.forgetting_kl_nats_per_token is not None else None
