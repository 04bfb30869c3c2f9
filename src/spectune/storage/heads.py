"""What head a base is loaded with: one that is trained beside a delta, which most checkpoints do not have yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spectune.errors import ConfigError
from spectune.objectives import CAUSAL_LM, TASK_TYPES, Objective, objective_for, objective_of, padding_of


@dataclass(frozen=True)
class HeadSettings:
    """What kind of head a base is loaded with, as `load` takes it. Raises ConfigError: settings that exclude each
    other."""

    task_type: str = CAUSAL_LM.task_type
    num_labels: int | None = None
    id2label: Mapping[int, str] | Sequence[str] | None = None
    problem_type: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task_type not in TASK_TYPES:
            raise ConfigError(f"task_type = {self.task_type!r}: expected one of {', '.join(TASK_TYPES)}")
        given = [name for name in ("num_labels", "id2label", "problem_type") if getattr(self, name) is not None]
        if given and not self.has_head:
            raise ConfigError(f"{', '.join(given)}: of a head, and task_type is CAUSAL_LM; set task_type to SEQ_CLS or "
                              "TOKEN_CLS")  # fmt: skip
        if self.num_labels is not None and self.num_labels < 1:
            raise ConfigError(f"num_labels = {self.num_labels}: expected one or more")
        if self.num_labels is not None and self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ConfigError(f"num_labels = {self.num_labels}, and id2label has {len(self.id2label)} names")

    @property
    def has_head(self) -> bool:
        """A head is trained with each delta; the vocabulary's is the base's."""
        return self.task_type != CAUSAL_LM.task_type

    @property
    def names(self) -> dict[int, str] | None:
        """The classes' names by their numbers."""
        if self.id2label is None:
            return None
        if isinstance(self.id2label, Mapping):
            return {int(number): str(name) for number, name in self.id2label.items()}
        return dict(enumerate(map(str, self.id2label)))

    def apply(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Objective:
        """Write them into a config, with the padding id by which a head finds the last token. Returns the objective."""
        if self.num_labels is not None and self.num_labels != config.num_labels:
            config.num_labels = self.num_labels
        if (names := self.names) is not None:
            config.id2label, config.label2id = names, {name: number for number, name in names.items()}
        if self.problem_type is not None:
            config.problem_type = cast(Any, self.problem_type)
        if self.has_head and padding_of(config) is None:
            ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
            config.get_text_config().pad_token_id = next((token for token in ids if isinstance(token, int)), 0)
        return objective_for(self.task_type, config)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ConfigError where a model that is given as an object has another head than these settings name."""
        if not self.has_head:
            return
        own, labels = objective_of(model).task_type, model.config.num_labels
        wanted = len(self.names) if self.names is not None else self.num_labels
        if own != self.task_type or wanted not in (None, labels):
            raise ConfigError(
                f"task_type = {self.task_type}, num_labels = {wanted}, and the model given is a {type(model).__name__} "
                f"for {own} with {labels} labels: give a base by name, or leave these out"
            )
