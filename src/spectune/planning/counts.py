"""Parameter counts from a config: the model is built without weights, on the meta device."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.families import Family, family_from_config

#: shapes everybody knows, for scale
REFERENCE_SHAPES: dict[str, PretrainedConfig] = {
    "GPT-2 124M": GPT2Config(),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Weights of one method on one base."""

    stored: int
    trained: int
    base: int

    @property
    def share(self) -> float:
        """Stored weights as a share of the base's (1.0 for full fine-tuning)."""
        return self.stored / self.base


def count(config: PretrainedConfig, method: Method) -> Count:
    """Weights that `method` stores and trains on a base of this config. No weight is made or read. Raises ConfigError
    where the method cannot act on this base."""
    return _count(family_from_config(config), method)


def _count(family: Family, method: Method) -> Count:
    return Count(method.num_parameters(family), method.num_trained_parameters(family), family.num_parameters)


def reference_shares(methods: Iterable[Method]) -> list[dict[str, object]]:
    """For each known shape, every method's stored weights and share; None with a reason where it cannot act."""

    def shared(family: Family, method: Method) -> dict[str, object]:
        try:
            counted = _count(family, method)
        except ConfigError as error:
            return {"parameters": None, "share": None, "reason": str(error)}
        return {"parameters": counted.stored, "share": counted.share}

    chosen, families = list(methods), {name: _reference_family(name) for name in REFERENCE_SHAPES}
    return [
        {"model": name, "total_parameters": family.num_parameters,
         "shares": {method.name: shared(family, method) for method in chosen}}
        for name, family in families.items()
    ]  # fmt: skip


@lru_cache
def _reference_family(name: str) -> Family:
    return family_from_config(REFERENCE_SHAPES[name])
