"""The arms of a comparison: methods under names, and what each learns of the rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectune.data import Labels, Row, find_labels, task_type_of
from spectune.data.head_labels import CAUSAL_LM, SEQ_CLS, TASK_TYPES
from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.methods import BY_NAME, method_from_name
from spectune.results import comparison_file as results


@dataclass(frozen=True)
class Arm:
    """One method of a comparison: `compare(..., methods=[LoRA(), Arm("LoRA head", LoRA(), task_type="SEQ_CLS")])`.

    Attributes:
        name: of its runs; what it is called where it is given.
        task_type: what it learns of the rows, see `TrainingConfig.task_type`; "auto" is as the comparison.
        labels: what its head says, once the rows are known; None of a language model.
        called: the label of tables; "": the method's own.
    """

    name: str
    method: Method
    task_type: str = "auto"
    labels: Labels | None = None
    called: str = ""

    @property
    def label(self) -> str:
        return self.called or self.method.label

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, and what it learns where that is not text: all that makes its runs other ones."""
        found = self.method.model_dump(mode="json")
        return found if self.labels is None else found | {"task_type": self.task_type}

    def record(self) -> results.Arm:
        """The arm as the comparison's files have it."""
        return results.Arm(
            name=self.name, method=self.method.name, label=self.label, best_for=self.method.best_for,
            settings=self.settings, task_type=self.task_type,
        )  # fmt: skip


def arms_of(methods: Any, precision: str | None) -> list[Arm]:
    """Each method under a name for its runs: the one that was given, or its own, with a number where one comes twice.

    Args:
        methods: names, methods or arms, or a mapping from names to methods or arms; None: all methods.
        precision: of the base's weights, where they are stored in few bits.

    Raises:
        ConfigError: no method, an unknown one, a task type that is none, or a method that trains a base in few bits.
    """
    wanted = _named(methods)
    if not wanted:
        raise ConfigError(f"no method to compare; expected some of {', '.join(BY_NAME)}, or their configs")
    arms: list[Arm] = []
    for given in wanted:
        task_type = given.task_type.strip().upper().replace("-", "_")
        if task_type not in ("AUTO", *TASK_TYPES):
            expected = f"expected auto or one of {', '.join(TASK_TYPES)}"
            raise ConfigError(f"arm {given.name}: task_type = {given.task_type!r}; {expected}")
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", given.name).strip("-.") or given.method.name
        taken = {arm.name for arm in arms}
        name = next(n for n in (slug, *(f"{slug}-{k}" for k in range(2, len(arms) + 3))) if n not in taken)
        kind = "auto" if task_type == "AUTO" else task_type
        arms.append(dataclasses.replace(given, name=name, task_type=kind))
    trained = [arm.name for arm in arms if arm.method.trains_base]
    if precision is not None and trained:
        raise ConfigError(
            f"base_precision = {precision} is for methods that leave the base frozen, and {', '.join(trained)} trains "
            "the base's own weights: leave it out of methods, or compare without base_precision"
        )
    return arms


def _named(methods: Any) -> list[Arm]:
    if isinstance(methods, Mapping):
        pairs = ((str(name), _arm(given)) for name, given in methods.items())
        return [dataclasses.replace(arm, name=name, called=name) for name, arm in pairs]
    return [_arm(given) for given in (methods if methods is not None else list(BY_NAME))]


def _arm(given: str | Method | Arm) -> Arm:
    if isinstance(given, Arm):
        own = given.name in ("", given.method.name)
        return dataclasses.replace(given, name=given.name or given.method.name, called="" if own else given.name)
    method = method_from_name(given) if isinstance(given, str) else given
    return Arm(method.name, method)


def with_labels(
    arms: Sequence[Arm], rows: Sequence[Row], task_type: str, known: Mapping[str, Mapping[int, str]]
) -> list[Arm]:
    """The arms with what each learns of the training rows; where some are language models and some have heads, a label
    of its own says which one it is.

    Args:
        task_type: of arms that leave it open; "auto": by the rows.
        known: by task type the classes of a checkpoint that has been trained for it.

    Raises:
        ConfigError: arms that learn text and arms with a head that is no classification of texts, between which
            nothing would decide. DataError: rows without labels.
    """
    common = task_type_of(rows) if task_type == "auto" else task_type
    types = [common if arm.task_type == "auto" else arm.task_type for arm in arms]
    found = {kind: find_labels(rows, kind, known.get(kind)) for kind in dict.fromkeys(types)}
    both = len(found) > 1
    if both and not (set(found) == {CAUSAL_LM, SEQ_CLS} and (found[SEQ_CLS] or Labels(SEQ_CLS)).names):
        kinds = " and ".join(labels.describe() if labels else kind for kind, labels in found.items())
        raise ConfigError(
            f"arms of {kinds} have no measure in common; expected one task_type, or CAUSAL_LM and a SEQ_CLS of "
            "classes, which accuracy decides between"
        )
    suffix = {CAUSAL_LM: "label words", SEQ_CLS: "head"}
    return [
        dataclasses.replace(
            arm, task_type=kind, labels=found[kind],
            called=arm.called or (f"{arm.method.label} ({suffix[kind]})" if both else ""),
        )
        for arm, kind in zip(arms, types, strict=True)
    ]  # fmt: skip


def tracks_of(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms that are of one kind of model, language models first."""
    kinds = sorted(dict.fromkeys(arm.task_type for arm in arms), key=TASK_TYPES.index)
    return [[arm for arm in arms if arm.task_type == kind] for kind in kinds]


def recorded_arms(given: Sequence[Arm]) -> dict[str, Any]:
    """Arms for a config.yaml: methods with a block of settings each; `arms` where some are named, or come twice."""
    if all(arm == Arm(arm.method.name, arm.method) for arm in given):
        blocks = {arm.method.name: arm.method.model_dump(mode="json", exclude={"name"}) for arm in given}
        return {"methods": [arm.method.name for arm in given], **blocks}
    return {
        "arms": [
            {
                **({"name": arm.called} if arm.called else {}), "method": arm.method.name,
                "task_type": arm.task_type, **arm.method.model_dump(mode="json", exclude={"name"}),
            }
            for arm in given
        ]
    }  # fmt: skip
