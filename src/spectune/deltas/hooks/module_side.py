"""What the hooks before and after a module share: whose rows are whose."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.layout import BatchLayout
from spectune.deltas.modules import SideModule
from spectune.deltas.row_groups import RowGroup
from spectune.deltas.slots import get
from spectune.deltas.table_route import Table
from spectune.errors import ConfigError


class SideHook:
    """A hook on one side of the module at `path`. `gathers_tokens`: the module is an expert, which is given some tokens
    of any row."""

    handle: Any
    #: what acts on this side
    kind: ClassVar[type[SideModule]]

    def __init__(self, module: nn.Module, path: str, state: ForwardState, *, gathers_tokens: bool) -> None:
        self.module, self.path, self.state, self.gathers_tokens = module, path, state, gathers_tokens
        #: what acts here under a `TableRoute`; found at the hook alone, so that compiled blocks are alike
        self.tables: tuple[Table, ...] = ()

    def close(self) -> None:
        self.handle.remove()

    def prepare(self, layout: BatchLayout) -> tuple[RowGroup, ...]:
        """What acts here on the rows of a batch."""
        grouping, site = layout.grouping, (self.path, self.kind.__name__)
        found = grouping.sites.get(site)
        if found is not None:
            return found
        here = ((name, get(self.module, name)) for name in dict.fromkeys(layout.names) if name is not None)
        return grouping.make(site, {name: module for name, module in here if isinstance(module, self.kind)})

    def mixed(self, sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides` (the module's input; after it also its output), with each row changed by its own delta.
        Raises ConfigError: rows cannot be told apart here."""
        given = sides[-1]
        layout = self.state.layout_of(given.shape[0])
        groups = self.prepare(layout)
        if not groups:
            return given
        if given.dim() == 2 and self.gathers_tokens:
            raise ConfigError(
                f"{self.path} stands among experts, which are given some tokens of any row: deltas at this place "
                "cannot share a batch with others. Route each of them in a batch of its own."
            )
        now = layout.apart(given, self.path)
        before = [side.reshape(now.shape[0], -1, side.shape[-1]) for side in sides[:-1]]
        for group in groups:
            made = group.by_row([*before, now])
            now = self._one_by_one(group, layout, [*sides[:-1], now.view(given.shape)]) if made is None else made
        return now.view(given.shape)

    @staticmethod
    def _one_by_one(group: RowGroup, layout: BatchLayout, sides: Sequence[Tensor]) -> Tensor:
        """The same as `RowGroup.by_row`, each delta on its own rows."""
        now = sides[-1]
        for module, rows in zip(group.modules, group.own, strict=True):
            pick = layout.picks(rows, now)
            now = now.index_copy(0, pick, module(*(side[pick] for side in sides[:-1]), now[pick]))
        return now.reshape(len(layout.names), -1, now.shape[-1])


def remove_copies(model: nn.Module) -> None:
    """Take hooks off copies of modules that had some (a layer put in twice), for which nobody has a handle."""
    for module in model.modules():
        for hooks, takes_names in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), SideHook)]:
                del hooks[key]
                takes_names.pop(key, None)
