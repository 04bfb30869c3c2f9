"""Loading bases: a model object, a local folder, a hub id, or the embedded `spectune-tiny`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.errors import ConfigError, DataError, OutOfMemoryError, first_line, is_out_of_memory
from spectune.families import vocabulary_rows
from spectune.objectives import CAUSAL_LM
from spectune.storage.accounting import check_numbers
from spectune.storage.base_precision import base_dtype, check_precision, quantise_base
from spectune.storage.descriptions import load_config, load_tokenizer, source_of
from spectune.storage.devices import resolve_device
from spectune.storage.heads import HeadSettings
from spectune.storage.models import Reading, read_model

__all__ = ["TINY", "load", "load_config", "load_tokenizer"]

log = logging.getLogger("spectune")

TINY = embedded.NAME


def load(
    name: str | Path | PreTrainedModel,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    base_precision: str | None = None,
    task_type: str = CAUSAL_LM.task_type,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_missing_weights: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer, in evaluation mode.

    Args:
        name: a hub id, a folder, `"spectune-tiny"`, or a loaded model, whose tokenizer is looked up by its name.
        device: "auto", "cpu", "cuda", "mps" or a torch device.
        dtype: "auto" is float32 on the CPU and the checkpoint's own type on CUDA; or "float32", "bfloat16",
            "float16", or a torch dtype.
        base_precision: "fp8", "nf4" or "int8": the weights of the layers' linears are stored so, for methods that
            leave the base frozen (see docs/quantised-bases.md); None leaves them in `dtype`. With fp8 or nf4 "auto" is
            bfloat16 on CUDA. The weights are read to the host first and go to the device one by one.
        task_type: the head, by PEFT's name: "CAUSAL_LM" (the vocabulary's), "SEQ_CLS" (a class or a number for a text)
            or "TOKEN_CLS" (a class for each token). The latter two are trained and stored with each delta.
        num_labels: outputs of that head; None: as the checkpoint's config has it. One of SEQ_CLS is a regression.
        id2label: the classes' names.
        problem_type: of SEQ_CLS, as transformers has it: "single_label_classification" or "regression".
        seed: of a head that the checkpoint has not, or has for another number of labels; and of weights that it lacks.
        trust_remote_code: Python code that comes with the base may run, with this process's rights; never asked for.
        allow_missing_weights: what the checkpoint lacks, or has in another shape, begins at random, and what of it the
            config has no place for is left out; both are said.

    Raises:
        ConfigError: a precision that this device, this base or a loaded model cannot take.
        DataError: the base cannot be found or read, is damaged, needs code of its own, or does not hold the weights
            of its config; the message says what to do.
        OutOfMemoryError: there is no room for it, on the host or the device.
    """
    check_precision(base_precision)
    head = HeadSettings(task_type, num_labels, id2label, problem_type, seed)
    if isinstance(name, PreTrainedModel):
        if base_precision is not None:
            raise ConfigError(
                f"base_precision = {base_precision} is for a base that is loaded by name, and a model was given: "
                "quantise that one with spectune.storage.quantise_base(model, precision)"
            )
        head.check(name)
        return name, load_tokenizer(str(name.config._name_or_path), trust_remote_code=trust_remote_code)
    source, place = source_of(name), resolve_device(device)
    config = load_config(source, trust_remote_code=trust_remote_code)
    if base_precision is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"base_precision = {base_precision}: {source} is quantised already; leave base_precision out")
    resolved = base_dtype(dtype, place, getattr(config, "dtype", None), base_precision)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    objective = head.apply(config, tokenizer) if head.has_head else CAUSAL_LM
    model = read_model(Reading(source, resolved, seed, trust_remote_code, allow_missing_weights), objective, config)
    _check_ids(source, model, tokenizer)
    return _placed(source, model, place, base_precision), tokenizer


def _check_ids(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError where the tokens that begin and end a text have no row in the base's embeddings."""
    rows = vocabulary_rows(model)
    if len(tokenizer) > rows:
        log.warning("%s: its tokenizer knows %d tokens, and it has embeddings for %d: texts with any of the others are "
                    "refused", source, len(tokenizer), rows)  # fmt: skip
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    if past := [f"{name} = {token}" for name, token in ids.items() if isinstance(token, int) and token >= rows]:
        raise DataError(
            f"{source}: its tokenizer has {' and '.join(past)}, and the base has embeddings for {rows} tokens: they do "
            "not belong together. Copy both again from where they were written, or resize the embeddings"
        )


def _placed(source: str, model: PreTrainedModel, place: torch.device, base_precision: str | None) -> PreTrainedModel:
    """The model on a device, with its weights looked at there. Raises OutOfMemoryError; DataError: weights are not
    finite."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    try:
        if base_precision is not None:
            check_numbers(source, model)  # of codes nobody can tell
            quantise_base(model, base_precision, device=place)
        moved: PreTrainedModel = model.to(place)  # type: ignore[arg-type]
        check_numbers(source, moved)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        how = f"quantised to {base_precision} on" if base_precision is not None else "put on"
        less = (
            "" if base_precision is not None else ", --base-precision nf4 or fp8 (methods that leave the base frozen)"
        )
        raise OutOfMemoryError(
            f"out of memory while {source} ({size / 2**30:,.2f} GiB in {str(model.dtype).removeprefix('torch.')}) was "
            f"{how} {place}: {first_line(error)}. Take --dtype bfloat16{less}, a smaller base, or another --device."
        ) from error
    return moved
