"""A trained head in a delta's folder: `modules_to_save` beside tensors of PEFT's layout, else by our own names.

PEFT wraps a module named there and stores a copy of it under its own path. Its SEQ_CLS and TOKEN_CLS add "classifier"
and "score" by themselves.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from spectune.deltas.peft_config import PREFIX
from spectune.errors import DataError
from spectune.families import Family

#: before a module's path; under prompt learning PEFT leaves out the second word
_PREFIXES = (PREFIX, "base_model.")
#: methods of PEFT's that do not wrap the base's modules
_PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
#: what PEFT trains of itself for a task with a head
IMPLIED = ("classifier", "score")
T = TypeVar("T")


def head_names(family: Family) -> list[str]:
    """The names of the head's tensors in a delta's state."""
    return [f"{part.path}.{name}" for part in family.trained_head for name, _ in part.shapes]


def parted(state: Mapping[str, T], family: Family) -> tuple[dict[str, T], dict[str, T]]:
    """A delta's state without its head, and the head's."""
    names = head_names(family)
    return ({name: value for name, value in state.items() if name not in names},
            {name: state[name] for name in names if name in state})  # fmt: skip


def with_head(
    config: dict[str, Any], tensors: dict[str, Tensor], head: Mapping[str, Tensor], family: Family
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A method's config and tensors with those of a head."""
    if not head:
        return config, tensors
    kind = config.get("peft_type")
    prefix = "" if kind is None else _PREFIXES[kind in _PROMPT_LEARNING]
    saved = [] if kind is None else sorted({part.path.split(".")[0] for part in family.trained_head})
    own = {"task_type": family.task_type} | ({"modules_to_save": saved} if saved else {})
    return config | own, tensors | {f"{prefix}{name}": tensor for name, tensor in head.items()}


def without_head(tensors: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse, of a folder's tensors: those of the method, and the head's by their names in a delta's state."""
    names = {prefix + name: name for name in head_names(family) for prefix in ("", *_PREFIXES)}
    own = {name: tensor for name, tensor in tensors.items() if name not in names}
    return own, {names[name]: tensor for name, tensor in tensors.items() if name in names}


def without_head_key(config: dict[str, Any]) -> dict[str, Any]:
    """A config of PEFT's without the head among its `modules_to_save`: the tensors say whether there is one. What
    else is saved there stays, for its method to refuse."""
    saved = config.get("modules_to_save")
    if not isinstance(saved, list):
        return config
    return config | {"modules_to_save": [name for name in saved if name not in IMPLIED] or None}


def check_head(tensors: Mapping[str, Tensor], task_type: str | None, family: Family, what: str) -> None:
    """Raise DataError where a folder's head is not this model's: none, one of another kind, or one for other labels.
    `task_type`: what the folder says that it was trained for."""
    if task_type in ("SEQ_CLS", "TOKEN_CLS") and task_type != family.task_type:
        raise DataError(
            f"{what} has a head for {task_type}, and this model is for {family.task_type}: load the base with "
            f"task_type={task_type!r}"
        )
    _, found = without_head(tensors, family)
    shapes = {f"{part.path}.{name}": shape for part in family.trained_head for name, shape in part.shapes}
    if missing := [name for name in shapes if name not in found]:
        raise DataError(
            f"{what} has no head ({', '.join(missing)} missing), and this model has one for {family.task_type}: it was "
            'trained for another task. Load the base for that (a causal language model: task_type="CAUSAL_LM").'
        )
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name]:
            raise DataError(
                f"{what}: the delta's head gives {tensor.shape[0]} outputs, this model's {shapes[name][0]} ({name} "
                f"{list(tensor.shape)}, expected {list(shapes[name])}). Load the base with "
                f"num_labels={tensor.shape[0]}."
            )
