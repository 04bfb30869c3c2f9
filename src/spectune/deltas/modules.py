"""The modules that act at a site. Their weights are float32 and stay so, whatever the base is cast to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectune.deltas.stacking import Stacking

#: by name, what a module's change is computed with
Operands = Mapping[str, Tensor]


class DeltaModule(nn.Module):
    """A module of one delta at one site. It follows the base's device, never its dtype (`model.half()` and such)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return,no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Of its weights; most often without a walk over all modules, for it is asked at every site of a pass."""
        near = (part for part in (self, *self._modules.values()) if part is not None)
        found = next((p for part in near for p in part._parameters.values() if p is not None), None)
        return next(self.parameters()).device if found is None else found.device

    def bind_shared(self, shared: nn.Module) -> None:
        """Keep a reference to the weights that all sites share, without owning them (they stand at the decoder)."""
        raise NotImplementedError

    def on_attach(self, host: nn.Module) -> None:
        """Called once, before the module is put at its site: `host` is the base's module there, for methods that read
        its weights. Raises ConfigError where the method cannot act there."""

    def rate_factor(self, name: str) -> float:
        """What a run's learning rate is multiplied with for the parameter `name`."""
        return 1.0

    def stored(self) -> dict[str, Tensor]:
        """What goes to disk, by name; by default the weights as they are."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `stored`, on a module built with the stored method."""
        own = dict(self.named_parameters())
        for name, tensor in tensors.items():
            own[name].data.copy_(tensor)


@dataclass(frozen=True)
class Kind:
    """What modules at one site have in common that are computed together, a set of operands for each row. It holds no
    weights: equal kinds are computed by one call.

    Attributes:
        of: whose `by_row` it is.
        settings: what `by_row` is given beside tensors.
        dropout: on the input, in training: rows are then computed one delta after the other.
    """

    of: type[SideModule]
    settings: tuple[Hashable, ...] = ()
    dropout: float = 0.0

    def by_row(self, operands: Operands, *sides: Tensor) -> Tensor:
        """`operands`: each `[rows, ...]`, filled up with zeros to the largest. `sides`: `x` `[rows, tokens,
        in_features]`, and after a module `y` `[rows, tokens, out_features]`. Returns the last one's like."""
        return self.of.by_row(operands, *sides, *self.settings)


class SideModule(DeltaModule):
    """Acts on one side of a module: on what goes in, or on what comes out.

    A subclass whose change of many rows, of a delta each, is one product says so with `operands`, `alike` and
    `by_row`; without them the rows of a mixed batch are computed one delta after the other."""

    #: the host's parameter that the same change can be made to in place of its input or output, see `changed`; None
    #: where it cannot
    acts_on: str | None = None
    #: `by_row` computes the output anew, whatever stood there: not for rows that have no such module
    replaces_output = False
    #: its operands take longer to make than what is done with them: what decodes keeps them from step to step
    costly = False

    def operands(self) -> dict[str, Tensor] | None:
        """What the change is computed with, float32, as the weights are now; gradients flow. None: there is no form by
        row."""
        return None

    def has_row_form(self) -> bool:
        """Whether there are operands; to be said without making costly ones."""
        return self.operands() is not None

    @staticmethod
    def stacked(modules: Sequence[Any], stack: Stacking) -> dict[str, Tensor]:
        """Operands of modules of one kind, `[modules, ...]`, smaller ones filled up with zeros."""
        each = [module.operands() for module in modules]
        return {name: stack([operands[name] for operands in each]) for name in each[0]}

    def unchanging(self) -> dict[str, Tensor] | None:
        """Operands of the same shapes with which `by_row` gives back what it is given: zeros, where that is so."""
        own = self.operands()
        return None if own is None else {name: torch.zeros_like(tensor) for name, tensor in own.items()}

    def alike(self) -> Kind:
        """Modules of one site whose kinds are equal may be computed together; their operands may differ in sizes that
        zeros fill up."""
        return Kind(type(self))

    @staticmethod
    def by_row(operands: Operands, *given: Any) -> Tensor:
        """`(operands, x, y, *settings)` after a module, `(operands, x, *settings)` before one; see `Kind.by_row`.
        Exact where operands are filled up with zeros; for any device and dtype of `x` and `y`, which are the
        base's."""
        raise NotImplementedError

    def changed(self, parameter: Tensor) -> Tensor:
        """The host's parameter `acts_on` with this change in it, for hosts whose parameters are used without their
        being called."""
        raise NotImplementedError

    def merge_into(self, module: nn.Module) -> None:
        """Write the delta into the base module's own weights, if the method can."""
        raise NotImplementedError


class OutputModule(SideModule):
    """Acts after a module: the site's input and output in, the new output out."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`x`: `[..., in_features]`, `y`: `[..., out_features]`, both in the base's dtype; returns `y`'s like."""
        raise NotImplementedError


class EntryModule(SideModule):
    """Acts before a module: the site's input in, the input that the module gets out."""

    def forward(self, x: Tensor) -> Tensor:
        """`x`: `[..., in_features]`, in the base's dtype; returns its like."""
        raise NotImplementedError


class ParameterModule(DeltaModule):
    """Acts on a parameter of the base: the parameter in, the changed one out."""

    def changed(self, parameter: Tensor) -> Tensor:
        """`parameter` as the base has it; returns a tensor of its shape and dtype, the base's own left as it is."""
        raise NotImplementedError

    def in_place_of(self, parameter: Tensor) -> Tensor:
        """What stands in the parameter's place while its layer runs: the changed one, or a tensor that answers as it
        does (`compute.low_rank`)."""
        return self.changed(parameter)


class AttentionModule(DeltaModule):
    """Acts inside attention: gives keys and values `[kv_heads, virtual tokens, dim]`, float32."""

    #: a layer's sliding window moves past them, as if they were the sequence's first tokens (PEFT's convention);
    #: otherwise they are visible from every position
    slides: bool = False

    def forward(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class InputModule(DeltaModule):
    """Acts on the sequence: gives embeddings `[virtual tokens, hidden]`, float32."""

    def forward(self) -> Tensor:
        raise NotImplementedError
