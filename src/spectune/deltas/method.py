"""The contract of a method: a frozen config that says where it acts and builds the modules that act there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from spectune.deltas.modules import DeltaModule
from spectune.deltas.rate_rule import RateRule
from spectune.deltas.site import Site
from spectune.deltas.trained_copy import HeadSite, TrainedCopy, head_factor, head_sites
from spectune.families import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class InitContext:
    """What a method may use to make a delta's first weights.

    Attributes:
        model: the bare base, in evaluation mode.
        generator: seeded; the only source of randomness.
        tokenizer: the base's, where the caller gave it.
        shared: what the delta's modules share (`Method.build_shared`).
    """

    model: PreTrainedModel
    family: Family
    generator: torch.Generator
    tokenizer: PreTrainedTokenizerBase | None
    shared: nn.Module | None

    def common_tokens(self, count: int) -> list[int]:
        """`count` ids drawn from the commonest tokens, special ones left out.

        Lester et al. 2021 sample from the 5,000 commonest; byte-pair ids rise as frequency falls."""
        special = set(getattr(self.tokenizer, "all_special_ids", None) or [])
        plain = plain_tokens(self.model.config.get_text_config(), self.family.vocab_size)
        pool = [token for token in plain if token not in special]
        picks = torch.randint(0, len(pool), (count,), generator=self.generator)
        return [pool[int(pick)] for pick in picks]


def plain_tokens(config: PretrainedConfig, vocabulary: int) -> list[int]:
    """The first 5,000 ids, without those that the config says begin, end or fill up a text."""
    special: set[int | None] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # some are lists, some types have none
        given = getattr(config, name, None)
        special |= set(given if isinstance(given, list | tuple) else [given])
    return [token for token in range(min(5000, vocabulary)) if token not in special]


@dataclass(frozen=True)
class Fitted:
    """A method of a folder of PEFT's on one base.

    Attributes:
        method: it names what the folder's tensors are for.
        left_out: tensors that PEFT does not take in either.
        said: what the user should know, or None.
    """

    method: Method
    left_out: frozenset[str] = frozenset()
    said: str | None = None


class _Stored(BaseModel, ABC):
    """How a method is written to folders. One that PEFT has overrides these with PEFT's layout."""

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`adapter_config.json` and the tensors of `adapter_model.safetensors` for a stored state."""
        return {"spectune_method": self.model_dump(mode="json")}, dict(state)

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        """The stored state (`site path.parameter` -> tensor) back from a folder's tensors, surplus keys kept."""
        return dict(tensors)

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> Method | None:
        """The method that a PEFT `adapter_config.json` describes, None where it is another's."""
        return None

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        """This method, which `from_peft_config` made of `config`, on one base: tensors say more exactly than the config
        where it acts. `tensors` are the folder's, on the meta device. Raises DataError: they are for places that this
        base has not."""
        assert isinstance(self, Method), "there is no other class of these"
        return Fitted(self)


class Method(_Stored):
    """A way to adapt a base. The frozen config *is* the method; a `Delta` is what it becomes on one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    name: str
    label: ClassVar[str]
    best_for: ClassVar[str]
    #: the default and what a search tries, by the base's size
    learning_rates: ClassVar[RateRule]
    #: the tuned model equals the base until the first step
    starts_at_identity: ClassVar[bool] = True
    #: the base itself is what is trained: no other delta can stand beside it
    trains_base: ClassVar[bool] = False
    can_merge: ClassVar[bool] = False

    def __hash__(self) -> int:
        return hash((type(self), self.model_dump_json()))  # pydantic's own cannot take fields that are dicts

    @property
    def virtual_tokens(self) -> int:
        """Positions that this method puts before the text (prefix, prompt); text positions are shifted by as many."""
        return 0

    @abstractmethod
    def sites(self, family: Family) -> list[Site]:
        """The places where this method acts. Raises ConfigError: the base has no such place, or a target names none."""

    @abstractmethod
    def build(self, site: Site) -> DeltaModule:
        """The module for one site, float32, on the CPU, not yet initialised."""

    def stored_shapes(self, family: Family) -> dict[str, Tensor]:
        """What a delta stores, named `site path.parameter`, on the meta device: absurd sizes cost nothing."""
        method = self.as_stored()
        with torch.device("meta"):
            built = [(site.path, module_at(method, site)) for site in all_sites(method, family)]
            return {f"{path}.{name}": tensor for path, module in built for name, tensor in module.stored().items()}

    def num_parameters(self, family: Family) -> int:
        """Weights stored and used at inference, from shapes alone."""
        return sum(tensor.numel() for tensor in self.stored_shapes(family).values())

    def num_bytes(self, family: Family) -> int:
        """Memory of a stored delta's modules on a model, what they keep of the base included."""
        method = self.as_stored()
        with torch.device("meta"):
            built = [module_at(method, site) for site in all_sites(method, family)]
        return sum(tensor.nbytes for module in built for tensor in (*module.parameters(), *module.buffers()))

    def num_trained_parameters(self, family: Family) -> int:
        """Weights trained: the same, plus what only training has."""
        with torch.device("meta"):
            built = [self.build_shared(family), *(module_at(self, site) for site in all_sites(self, family))]
        return sum(p.numel() for module in built if module is not None for p in module.parameters())

    def build_shared(self, family: Family) -> nn.Module | None:
        """Weights that all sites share and only training has (a prefix's reparametrisation)."""
        return None

    @abstractmethod
    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """Write the first weights of the modules, each given with its site, in the model's order. Randomness comes from
        `context.generator` only, so that a seed gives the same delta everywhere."""

    def prove(self, model: PreTrainedModel, family: Family) -> None:
        """Check by running the bare base what `sites` had to take from names and shapes. By default nothing. Raises
        ConfigError: this base is built otherwise; the attach is undone."""

    def notice(self, family: Family) -> str | None:
        """A sentence the user should read when this method meets this base, or None."""
        return None

    def as_stored(self) -> Method:
        """The method that a stored delta has: without what only training had."""
        return self


def all_sites(method: Method, family: Family) -> list[Site]:
    """A method's own sites, and those of the model's head, of which every delta has a copy."""
    return [*method.sites(family), *([] if method.trains_base else head_sites(family))]


def module_at(method: Method, site: Site) -> DeltaModule:
    """The module for one of `all_sites`, as `Method.build` has it."""
    if isinstance(site, HeadSite):
        return TrainedCopy(site, head_factor(site, method.learning_rates))
    return method.build(site)
