"""What the hooks before and after a module share: whose rows are whose."""

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.layout import BatchLayout
from spectune.deltas.modules import SideModule
from spectune.deltas.row_groups import Grouping, SiteRows
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
        self.pass_here = _Pass()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": ()}  # a copied model begins with no tables

    def close(self) -> None:
        self.handle.remove()

    def prepare(self, layout: BatchLayout | None) -> None:
        """Find out what acts here on the rows of the pass that begins on this thread, or forget the last one's."""
        here = self.pass_here
        here.grouping, here.rows = (None, None) if layout is None else (layout.grouping, self._rows(layout))

    def _rows(self, layout: BatchLayout) -> SiteRows | None:
        grouping, site = layout.grouping, (self.path, self.kind.__name__)
        if site in grouping.sites:
            return grouping.sites[site]
        here = ((name, get(self.module, name)) for name in dict.fromkeys(layout.names) if name is not None)
        found = {name: module for name, module in here if isinstance(module, self.kind)}
        return grouping.make(site, found, self.state.stacking)

    def mixed(self, sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides` (the module's input; after it also its output), with each row changed by its own delta.
        Raises ConfigError: rows cannot be told apart here."""
        given = sides[-1]
        layout = self.state.layout_of(given.shape[0])
        here = self.pass_here
        rows = here.rows if here.grouping is layout.grouping else self._rows(layout)
        if rows is None:
            return given
        if given.dim() == 2 and self.gathers_tokens:
            raise ConfigError(
                f"{self.path} stands among experts, which are given some tokens of any row: deltas at this place "
                "cannot share a batch with others. Route each of them in a batch of its own."
            )
        batch = layout.apart(given, self.path)

        def picked(module: SideModule, own: Tensor) -> Tensor:
            """On their rows by themselves, as the hook was given them."""
            pick = layout.picks(own, given)
            made: Tensor = module(*(side.index_select(0, pick) for side in sides))
            return made.reshape(own.shape[0], -1, batch.shape[-1])

        before = [side.reshape(batch.shape[0], -1, side.shape[-1]) for side in sides[:-1]]
        return rows.changed([*before, batch], picked).reshape(given.shape)


class _Pass(threading.local):
    """What acts at a site on the rows of the pass that runs on this thread. Compiled code reads it here, where it is in
    the same place for every block."""

    def __init__(self) -> None:
        self.grouping: Grouping | None = None
        self.rows: SiteRows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pass, ()


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
