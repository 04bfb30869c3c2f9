"""Running what was exported, by the program that it was written for: transformers alone, or PEFT on transformers.

Each loads the folder and its base afresh, as its reader will.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.deltas.folder import CONFIG_FILE
from spectune.errors import ConfigError, ExportError, OutOfMemoryError
from spectune.files.metadata import read_json
from spectune.storage.delta_folder import load_delta
from spectune.storage.descriptions import source_of
from spectune.storage.expectation import FULL, Batch, ExpectedAnswers, inputs_of
from spectune.storage.export import PROMPT_EMBEDS_FILE
from spectune.storage.pretrained import from_pretrained

#: characters of what a program says that are kept: PEFT lists every name that it misses
_SAID = 400


@dataclass
class Engine:
    """An export, loaded by the program that it was written for.

    Attributes:
        name: the program, with its version.
        logits: `[1, length, vocabulary]` of one row.
        exact: everything is float32: what differs is a fault, or the order of sums.
        says: what the program said while it loaded: names that it missed, or did not expect.
        caveat: what was not proved, where the program itself is not here.
    """

    name: str
    logits: Callable[[Batch], Tensor]
    exact: bool
    says: list[str] = field(default_factory=list)
    caveat: str | None = None


@contextlib.contextmanager
def running(folder: Path, expected: ExpectedAnswers) -> Iterator[Engine]:
    """The export in `folder`, loaded and ready. Raises ExportError: the program refuses the folder, or its base. Raises
    ConfigError: the folder holds nothing that can be run."""
    makers = {CONFIG_FILE: _by_peft, PROMPT_EMBEDS_FILE: _by_embeddings, "config.json": _by_transformers}
    made = next((make for file, make in makers.items() if (folder / file).is_file()), None)
    if made is None:
        raise ConfigError(f"{folder} holds nothing that can be run: expected one of {', '.join(makers)}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model, engine = made(folder, expected)
        except (torch.OutOfMemoryError, MemoryError, ConfigError, ExportError, OutOfMemoryError):
            raise
        except Exception as error:  # whatever the program has to say of the folder, it is not what was to be written
            raise ExportError(f"what was exported cannot be loaded: {type(error).__name__}: {error}") from error
        engine.says += [str(warning.message)[:_SAID] for warning in told if issubclass(warning.category, UserWarning)]
        with evaluating(model):
            yield engine


def _by_transformers(folder: Path, expected: ExpectedAnswers) -> tuple[Any, Engine]:
    model, found = from_pretrained(
        expected.base_class, str(folder), "what was exported", trust_remote_code=False, dtype="auto",
        output_loading_info=True,
    )  # fmt: skip
    says = [f"{kind.replace('_', ' ')}: {', '.join(map(str, names))}" for kind, names in found.items() if names]
    model = model.to(expected.device)
    exact = expected.exact and all(parameter.dtype in FULL for parameter in model.parameters())
    return model, Engine(_transformers(), _caller(model), exact, says)


def _by_peft(folder: Path, expected: ExpectedAnswers) -> tuple[Any, Engine]:
    base = _fresh_base(_named_in(folder / CONFIG_FILE), expected)
    exact = expected.exact
    try:
        with _quietly("bitsandbytes"):  # PEFT imports it, and it says which kernels it has not
            import peft
    except ImportError:
        load_delta(base, folder, name="export")
        caveat = (
            "PEFT is not installed here, so PEFT itself has not run this folder: it was read back by spectune, onto "
            "the base loaded afresh. To have it proved: pip install peft, and export again"
        )
        name = f"spectune's own reader of PEFT's layout, {_transformers()}"
        return base, Engine(name, _caller(base), exact, caveat=caveat)
    model = peft.PeftModel.from_pretrained(base, str(folder))

    def logits(batch: Batch) -> Tensor:
        found: Tensor = model(**inputs_of(batch, expected.device)).logits
        # PEFT gives the logits of virtual tokens too
        return found[:, -batch["input_ids"].shape[1] :] if found.dim() == 3 else found

    return model, Engine(f"PEFT {version('peft')}, {_transformers()}", logits, exact)


def _by_embeddings(folder: Path, expected: ExpectedAnswers) -> tuple[Any, Engine]:
    with safe_open(folder / PROMPT_EMBEDS_FILE, "pt") as file:
        name = (file.metadata() or {}).get("base_model_name_or_path", "")
        stored = file.get_tensor("prompt_embeds")
    base = _fresh_base(name, expected)
    virtual = stored.to(expected.device, expected.dtype)[None]
    embed: Any = base.get_input_embeddings()

    def logits(batch: Batch) -> Tensor:
        inputs = inputs_of(batch, expected.device)
        together = torch.cat([virtual, embed(inputs.pop("input_ids")).to(expected.dtype)], dim=1)
        mask = torch.ones(together.shape[:2], dtype=torch.int64, device=expected.device)
        found: Tensor = base(**inputs | {"inputs_embeds": together, "attention_mask": mask}, use_cache=False).logits
        return found[:, virtual.shape[1] :]

    exact = expected.exact and stored.dtype in FULL
    return base, Engine(f"{_transformers()}, inputs_embeds", logits, exact)


@contextlib.contextmanager
def _quietly(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _caller(model: Any) -> Callable[[Batch], Tensor]:
    def logits(batch: Batch) -> Tensor:
        found: Tensor = model(**inputs_of(batch, model.device), use_cache=False).logits
        return found

    return logits


def _named_in(config_file: Path) -> str:
    return str((read_json(config_file) or {}).get("base_model_name_or_path") or "")


def _fresh_base(name: str, expected: ExpectedAnswers) -> PreTrainedModel:
    """The base that the export names, as its reader will load it: by transformers alone."""
    if not name:
        raise ConfigError(
            "an export names its base, for its reader to load, and this base was not loaded from a folder or the hub: "
            "save it (model.save_pretrained), load it from there, and load the delta onto that"
        )
    # its class is here, with its code: none of the folder's is asked for
    model: PreTrainedModel = from_pretrained(
        expected.base_class,
        source_of(name),
        "its weights",
        trust_remote_code=False,
        dtype=expected.dtype,
        **expected.head,
    )
    if model.device == expected.device:  # checkpoints in few bits are where they are, and cannot be moved
        return model
    moved: PreTrainedModel = model.to(expected.device)  # type: ignore[arg-type]
    return moved


def _transformers() -> str:
    return f"transformers {version('transformers')}"
