"""Reading a base's model, with every weight accounted for."""

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from spectune.families import describe
from spectune.objectives import CAUSAL_LM, Objective
from spectune.storage.accounting import Account
from spectune.storage.base_files import read_config, read_weights
from spectune.storage.pretrained import fetch_weights, from_pretrained
from spectune.storage.pretrained import reading as reading_files

log = logging.getLogger("spectune")


@dataclass(frozen=True)
class Reading:
    """How a base is read, as `load` takes it.

    Attributes:
        seed: of weights that begin at random.
    """

    source: str
    dtype: torch.dtype
    seed: int = 0
    trust_remote_code: bool = False
    allow_missing_weights: bool = False


def read_model(reading: Reading, objective: Objective, config: PretrainedConfig) -> PreTrainedModel:
    """The base on the host, in evaluation mode; with the head of `config`: the checkpoint's own, where it has one of
    these sizes, and else one that is drawn as transformers draws it, with the seed.

    Raises:
        DataError: its files are damaged, or do not hold what its config describes.
        OutOfMemoryError: memory ran out.
    """
    source = reading.source
    fetch_weights(source)
    weights = read_weights(source, read_config(source))
    quantised = (bits := getattr(config, "quantization_config", None)) is not None
    with reading_files(source, "config.json"):
        known: Any = AutoHfQuantizer.supports_quant_method
        if isinstance(bits, dict) and not known(bits):
            raise ValueError("it is quantised in a way that transformers does not know, and would pass over")
    account = Account(source, weights, quantised, reading.allow_missing_weights, reading.seed)
    empty = objective.empty_model(copy.deepcopy(config))
    account.check_headers(empty)
    files = f"{weights.names} ({weights.nbytes / 2**30:,.2f} GiB)"
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(reading.seed)
        model, found = from_pretrained(
            objective.auto_class, source, files, config=config, dtype=reading.dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=reading.trust_remote_code,
        )  # fmt: skip
    has_head = objective.task_type != CAUSAL_LM.task_type
    head = tuple(f"{part.path}." for part in describe(model).trained_head) if has_head else ()
    if new := account.check_found(model, found, empty, head):
        log.info(
            "%s has no head for %s with %d outputs: %s begins at random (seed %d) and is trained with the delta",
            source, objective.task_type, config.num_labels, " and ".join(new), reading.seed,
        )  # fmt: skip
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own tables of new and unused weights are left out: what they say is said once, here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
