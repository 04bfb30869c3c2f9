"""Loading bases: a model object, a local folder, a hub id, or the embedded `spectune-tiny`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.errors import ConfigError
from spectune.objectives import CAUSAL_LM
from spectune.storage.base_precision import base_dtype, check_precision, quantise_base
from spectune.storage.descriptions import load_config, load_tokenizer, read, source_of
from spectune.storage.devices import resolve_device
from spectune.storage.heads import HeadSettings, read_model

__all__ = ["TINY", "load", "load_config", "load_tokenizer"]

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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer, in evaluation mode.

    Args:
        name: a hub id, a local folder, `"spectune-tiny"`, or a loaded model (whose tokenizer is then looked up by
            the name it was loaded from).
        device: "auto", "cpu", "cuda", "mps" or a torch device.
        dtype: "auto" is float32 on the CPU and the checkpoint's own type on CUDA; or "float32", "bfloat16",
            "float16", or a torch dtype.
        base_precision: "fp8", "nf4" or "int8": the weights of the layers' linears are stored so, for methods that
            leave the base frozen (see docs/quantised-bases.md); None leaves them in `dtype`. With fp8 or nf4 "auto" is
            bfloat16 on CUDA. The weights are read to the host first and go to the device one by one.
        task_type: the head, by PEFT's name: "CAUSAL_LM" (the vocabulary's), "SEQ_CLS" (a class or a number for a text)
            or "TOKEN_CLS" (a class for each token). The latter two are trained and stored with each delta.
        num_labels: outputs of that head; None: as the checkpoint's config has it. One output of SEQ_CLS is a number
            (regression).
        id2label: the classes' names.
        problem_type: of SEQ_CLS, as transformers has it: "single_label_classification" or "regression".
        seed: of a head that the checkpoint has not, or has for another number of labels.

    Raises:
        ConfigError: a precision that this device or this base cannot take, or one for a model that is loaded already.
        DataError: the base cannot be found or read; the message lists what to do.
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
        return name, load_tokenizer(str(name.config._name_or_path))
    source = source_of(name)
    place = resolve_device(device)
    config = load_config(source)
    if base_precision is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"base_precision = {base_precision}: {source} is quantised already; leave base_precision out")
    resolved = base_dtype(dtype, place, getattr(config, "dtype", None), base_precision)
    tokenizer = load_tokenizer(source)
    model = read(source, lambda: read_model(source, config, head, tokenizer, resolved))
    if base_precision is not None:
        quantise_base(model, base_precision, device=place)
    return model.to(place).eval(), tokenizer
