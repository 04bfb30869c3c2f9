"""What is trained and with what, whatever the batch: a base without its weights, a method, an optimizer, a device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.families import base_precision as base_precision_of
from spectune.methods import method_from_name
from spectune.objectives import CAUSAL_LM, Objective, objective_for, objective_of, padding_of
from spectune.storage.base_precision import base_dtype, check_precision
from spectune.storage.descriptions import load_config, positions_of


@dataclass(frozen=True)
class Workload:
    """A base and how it is trained. It holds no weights: of a loaded model it has the class and the config.

    Attributes:
        name: what the user calls the base.
        dtype: of the base's weights.
        device: kind of device: "cuda", "cpu" or "mps".
        base_precision: what the frozen linears' weights are stored in; None: in `dtype`.
        optim: as in `TrainingConfig`.
        accumulates: a step has several batches, whose gradients add up.
        model_class: of a loaded model; None is the class that transformers has for the config.
        weights: bytes of each tensor of a loaded model's own; None counts those of the class built anew.
        objective: what it is trained for: its loss, and the head of a class built anew.
    """

    name: str
    config: PretrainedConfig
    method: Method
    dtype: torch.dtype
    device: str
    base_precision: str | None = None
    optim: str = "adamw_torch_fused"
    accumulates: bool = False
    model_class: type[PreTrainedModel] | None = None
    weights: tuple[int, ...] | None = None
    objective: Objective = CAUSAL_LM

    @classmethod
    def of(
        cls, base: str | Path | PretrainedConfig | PreTrainedModel, method: str | Method,
        dtype: str | torch.dtype | None = None, device: str | torch.device = "cuda", *,
        base_precision: str | None = None, optim: str = "adamw_torch_fused", accumulates: bool = False,
        task_type: str | None = None, num_labels: int | None = None, trust_remote_code: bool = False,
    ) -> Workload:  # fmt: skip
        """From what `plan` takes, which describes these arguments. A loaded model has its head already.

        Raises:
            ConfigError: a setting is wrong, or the loaded model has another precision than the one given.
            DataError: no such base.
        """
        kind = torch.device(device).type
        described = load_config(base, trust_remote_code=trust_remote_code) if isinstance(base, str | Path) else base
        config: Any = copy.deepcopy(described.config if isinstance(described, PreTrainedModel) else described)
        if num_labels is not None:
            config.num_labels = num_labels
        if padding_of(config) is None:  # a head finds the last token by it; which id it is changes nothing here
            config.get_text_config().pad_token_id = 0
        name = str(base) if isinstance(base, str | Path) else getattr(config, "_name_or_path", "") or config.model_type
        model_class = weights = None
        objective = objective_for(task_type or CAUSAL_LM.task_type, config)
        check_precision(base_precision)
        if isinstance(described, PreTrainedModel):
            own = base_precision_of(described)
            if base_precision not in (None, own):
                raise ConfigError(
                    f"base_precision = {base_precision}, and the model given was loaded with {own}: plan it by name"
                )
            base_precision, dtype = own, described.dtype if dtype is None else dtype
            model_class, weights = type(described), tuple(tensor_bytes(described))
            objective = objective_of(described)
            # under a prefix the model has our attention's name, which attaching a method sets again
            text = config.get_text_config()
            text._attn_implementation = str(text._attn_implementation).removeprefix("spectune_")
        dtype = base_dtype("auto" if dtype is None else dtype, torch.device(kind), getattr(config, "dtype", None),
                           base_precision)  # fmt: skip
        method = method_from_name(method) if isinstance(method, str) else method
        return cls(
            str(name), config, method, dtype, kind, base_precision, optim, accumulates, model_class, weights, objective
        )  # fmt: skip

    @property
    def max_length(self) -> int | None:
        """Tokens of a row that the base has positions for, less the method's virtual ones; None is without limit."""
        context = positions_of(self.config)
        return None if context is None else context - self.method.virtual_tokens

    def check_length(self, length: int) -> None:
        """Raises ConfigError where rows of so many tokens and the method's virtual ones have no room in the base's
        positions."""
        most, method = self.max_length, self.method
        if most is not None and length > most:
            extra = f" and {method.virtual_tokens} virtual ones of {method.label}" if method.virtual_tokens else ""
            context = most + method.virtual_tokens
            raise ConfigError(f"{length} tokens{extra}, but this base has {context} positions: at most {most} tokens")

    def model(self) -> PreTrainedModel:
        """The base on the meta device, with a config of its own: setting an attention function writes into it."""
        config, chosen = copy.deepcopy(self.config), self.model_class
        make: Any = self.objective.empty_model if chosen is None else chosen._from_config
        with torch.device("meta"):
            model: PreTrainedModel = make(config, dtype=self.dtype)
        return model


def tensor_bytes(model: nn.Module) -> list[int]:
    """Bytes of each tensor of the base, tied ones once, a delta's weights left out."""
    named = [*model.named_parameters(), *model.named_buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for n, t in named if ".deltas." not in f".{n}"}
    return list(storages.values())
