"""From rows and settings to what a run trains on: token ids, length, rate, and the run's identity."""

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.data import (
    DataReport,
    Encoded,
    Example,
    Labels,
    Row,
    encode,
    load_rows,
    pad_token_id,
    split_rows,
    task_type_of,
    weighted,
)
from spectune.data.head_labels import CAUSAL_LM
from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.families import base_precision, embedding_width, vocabulary_rows
from spectune.objectives import objective_of
from spectune.results.run_result import TrainSource
from spectune.storage.descriptions import positions_of
from spectune.training.config import DEFAULT_LENGTH, TrainingConfig
from spectune.training.identity import FILE, identity_of, read_identity


@dataclass(frozen=True)
class Prepared:
    """What a run trains on: token ids of training and validation rows, settings, and what follows from all of them.
    `labels`: what the model's head says; None of a language model."""

    config: TrainingConfig
    rows: list[Row]
    encoded: tuple[Encoded, Encoded]
    learning_rate: float
    max_length: int
    identity: dict[str, Any]
    pad_token_id: int
    labels: Labels | None = None

    @property
    def examples(self) -> list[Example]:
        return self.encoded[0].examples

    @property
    def valid(self) -> list[Example]:
        return self.encoded[1].examples


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, train_rows: Any, valid_rows: Any,
    config: TrainingConfig, base: Mapping[str, Any], processes: int = 1,
) -> Prepared:  # fmt: skip
    """Read and encode the rows for one method on one base.

    Args:
        train_rows, valid_rows: what `train` takes; both `Encoded`, at most the config's `max_length` long: used as
            they are, so that many runs on the same rows encode them once.
        base: the fingerprint of the base before training.
        processes: that share out each step's rows.

    Raises:
        ConfigError, DataError: a length that the base has no room for, or bad data.
    """
    length, vocab_size = max_length(model, method, config), vocabulary_rows(model)
    config, labels = dated(config, tokenizer), Labels.of_model(objective_of(model).task_type, model.config)
    if isinstance(train_rows, Encoded):
        train, valid, rows = train_rows, valid_rows, train_rows.rows
    else:
        rows = load_rows(train_rows, **config.row_options)
        if valid_rows is None:
            rows, held_out = split_rows(rows, seed=config.seed)
        else:
            held_out = load_rows(valid_rows, **config.row_options)
        _check_task(model, config, rows)
        how: dict[str, Any] = {"max_length": length, "vocab_size": vocab_size, "labels": labels}
        how |= config.encode_options
        train, valid = (encode(part, tokenizer, **how) for part in (rows, held_out))
        train = weighted(train, rows.weights, config.seed)
    rate = config.learning_rate or method.learning_rates.at(embedding_width(model)).rate
    identity = identity_of(
        config, method, learning_rate=rate, max_length=length, encoded=(train, valid), base=base,
        dtype=str(model.dtype).removeprefix("torch."), base_precision=base_precision(model),
    )  # fmt: skip
    identity["processes"] = processes
    if labels is not None:
        identity["head"] = json.loads(json.dumps(dataclasses.asdict(labels)))
    config = config.model_copy(update={"task_type": objective_of(model).task_type})
    pad = pad_token_id(tokenizer, vocab_size)
    return Prepared(config, rows, (train, valid), rate, length, identity, pad, labels)


def _check_task(model: PreTrainedModel, config: TrainingConfig, rows: Sequence[Row]) -> None:
    """Raises ConfigError: the setting, or the rows where that is left open, are for another head than the model has."""
    has, wanted = objective_of(model).task_type, config.task_type
    asked = task_type_of(rows) if wanted == "auto" else wanted
    if asked == has or (wanted == "auto" and has != CAUSAL_LM):
        return
    found = f"task_type = {wanted}" if wanted != "auto" else f"the rows are for {asked} (task_type auto)"
    kind = type(model).__name__
    text = f", or set task_type to {CAUSAL_LM}, and the text alone is learned" if asked == "SEQ_CLS" else ""
    raise ConfigError(
        f"{found}, and the model given is a {kind}, which is for {has}: load the base with "
        f"spectune.load(name, task_type={asked!r}, ...)" + (text if wanted == "auto" else "")
    )


def train_sources(report: DataReport) -> dict[str, TrainSource]:
    """Of training rows that were mixed from sources, what an epoch has of each; {} of others."""
    return {
        name: TrainSource(rows=found.rows, weight=found.weight, examples=found.epoch_examples)
        for name, found in report.sources.items()
        if found.weight is not None
    }


def dated(config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingConfig:
    """The config with the date that the tokenizer's chat template is to see, if that writes one: the day on which the
    run began, whenever it goes on."""
    if config.template_date is not None or "strftime_now" not in str(tokenizer.chat_template):
        return config
    folder = config.output_dir
    begun = folder is not None and config.resume and (folder / FILE).is_file()
    recorded = read_identity(folder).get("template_date") if begun and folder is not None else None
    date = datetime.date.fromisoformat(recorded) if recorded else datetime.date.today()
    return config.model_copy(update={"template_date": date})


def total_steps(rows: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimizer steps of a run on so many examples."""
    if config.max_steps > 0:
        return config.max_steps
    batch_count = math.ceil(rows / (config.per_device_train_batch_size * processes))
    per_epoch = math.ceil(batch_count / config.gradient_accumulation_steps)
    return max(1, round(per_epoch * config.num_train_epochs))


def steps_of_run(examples: Sequence[Example], config: TrainingConfig) -> int | None:
    """`total_steps`; None where there are no examples, and nobody says how many steps."""
    return total_steps(len(examples), config) if examples or config.max_steps > 0 else None


def max_length(model: PreTrainedModel, method: Method, config: TrainingConfig) -> int:
    """`row_tokens` of a loaded model."""
    return row_tokens(positions_of(model.config), method, config)


def row_tokens(positions: int | None, method: Method, config: TrainingConfig) -> int:
    """Tokens of a row: as configured, else what the base has room for beside the method's virtual tokens.

    Args:
        positions: of the base; None where there is no limit.

    Raises:
        ConfigError: more is configured than the base has room for, or it has none for rows.
    """
    if positions is None:
        return config.max_length or DEFAULT_LENGTH
    room = positions - method.virtual_tokens
    if room < 2:
        raise ConfigError(
            f"{method.label} takes {method.virtual_tokens} virtual tokens, and this base has {positions} positions: "
            f"none are left for rows. Take fewer, or leave {method.name} out."
        )
    if config.max_length is None:
        return min(DEFAULT_LENGTH, room)
    if config.max_length > room:
        raise ConfigError(
            f"max_length = {config.max_length}, but this base has {positions} positions"
            + (f", {method.virtual_tokens} of which {method.label} takes" if method.virtual_tokens else "")
            + f": at most {room}"
        )
    return config.max_length
