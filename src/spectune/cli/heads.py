"""What is learned of the rows that a command has: their text, or labels, with a head of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectune.cli.console import note

if TYPE_CHECKING:
    from spectune.cli.settings import Settings
    from spectune.comparing import Arm
    from spectune.data import Labels, Row


def decided(settings: Settings, rows: Sequence[Row], base: Any = None) -> Labels | None:
    """The labels that a head of the base learns of training rows, by `task_type` or the rows themselves; None where
    their text is learned. What was decided is said.

    Args:
        base: the base's config, where it has been read.

    Raises:
        ConfigError: the setting is wrong. DataError: rows without a label, or with labels of mixed kinds.
    """
    from spectune.cli.settings import own_code
    from spectune.data import find_labels, task_type_of
    from spectune.data.head_labels import classes_of_checkpoint
    from spectune.storage import load_config

    wanted = settings.training().task_type
    task_type = task_type_of(rows) if wanted == "auto" else wanted
    if task_type == "CAUSAL_LM":
        return None
    config = base
    if config is None:
        config = load_config(settings.base, **own_code(settings))
    labels = find_labels(rows, task_type, classes_of_checkpoint(config, task_type))
    if labels is not None:
        note(f"task: {labels.describe()}{', by the rows' if wanted == 'auto' else ''}")
    return labels


def learned_by(arms: Sequence[Arm], settings: Settings, rows: Sequence[Row]) -> list[Arm]:
    """Arms with what each learns of training rows, which is said. Raises as `spectune.comparing.arms.with_labels`."""
    from spectune.cli.settings import own_code
    from spectune.comparing.arms import arms_of, with_labels
    from spectune.data.head_labels import SEQ_CLS, TOKEN_CLS, classes_of_checkpoint
    from spectune.storage import load_config

    config = load_config(settings.base, **own_code(settings))
    known = {kind: classes_of_checkpoint(config, kind) for kind in (SEQ_CLS, TOKEN_CLS)}
    named = arms_of(arms, settings.text("base_precision"))
    found = with_labels(named, rows, settings.training().task_type, known)
    for labels in dict.fromkeys(arm.labels for arm in found if arm.labels is not None):
        note(f"task: {labels.describe()}")
    return found


def labels_of_checkpoint(base: str, trust_remote_code: bool = False) -> Labels | None:
    """What the head of a model that is taken as it is says, by its config; None of a language model's."""
    from spectune.data import Labels
    from spectune.data.head_labels import SEQ_CLS, TOKEN_CLS, classes_of_checkpoint
    from spectune.storage import load_config

    config = load_config(base, trust_remote_code=trust_remote_code)
    kind = next((kind for kind in (SEQ_CLS, TOKEN_CLS) if classes_of_checkpoint(config, kind)), None)
    return None if kind is None else Labels.of_model(kind, config)


def auto_class(labels: Labels | None) -> str:
    """The end of the name of transformers' class, and of PEFT's, that loads a model with this head."""
    endings = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
    return "ForCausalLM" if labels is None else endings[labels.task_type]


def head_options(labels: Labels | None) -> dict[str, Any]:
    """How a base is loaded with that head: arguments of `spectune.load`."""
    return {} if labels is None else labels.load_options


def recorded_labels(config: Mapping[str, Any]) -> Labels | None:
    """Those of a run, as its config.yaml (or its delta's training.json) has them; None of a language model's."""
    from spectune.data import Labels

    task_type = str(config.get("task_type") or "CAUSAL_LM")
    if task_type in ("auto", "CAUSAL_LM"):
        return None
    return Labels(task_type, tuple(str(name) for name in config.get("row_labels") or ()))


def as_learned(config: Mapping[str, Any], rows: list[Row]) -> list[Row]:
    """Rows as a run had them: of texts with labels a language model that stood beside heads had the label's words."""
    from spectune.comparing.label_words import as_words
    from spectune.data import Labels

    names = tuple(str(name) for name in config.get("row_labels") or ())
    if not names or str(config.get("task_type")) != "CAUSAL_LM":
        return rows
    return as_words(rows, Labels("SEQ_CLS", names))
