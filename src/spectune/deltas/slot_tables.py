"""The operands of many deltas in tables, a slot each: rows of a step read their slots, whichever deltas these hold.

What decodes with them records or compiles one step for any mixture of deltas. Slot 0 is the bare base.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas.attachment import Attachment
from spectune.deltas.delta import Delta
from spectune.deltas.modules import AttentionModule, DeltaModule, InputModule, Kind, Operands, SideModule
from spectune.deltas.site import OutputSite, Site
from spectune.deltas.table_route import SiteTables, Table, TableRoute
from spectune.errors import ConfigError

#: a module's path, whether its input is changed, and how
_Key = tuple[str, bool, Kind]


@dataclass(eq=False)
class _Held:
    """A delta in a slot. `uses`: how many want it there."""

    slot: int
    delta: Delta
    kinds: frozenset[Kind] = frozenset()
    uses: int = 1


class SlotTables:
    """Tables for the deltas of one model, which one thread fills and reads.

    Matrices are kept in the base's dtype and vectors in float32, on the device of their delta's modules. Where deltas
    of one kind have unlike ranks, tables grow to the next power of two, and smaller ones are filled up with zeros.

    Args:
        model: it has deltas, or a `Bank`; in evaluation mode.
        slots: for as many deltas at once, beside slot 0.

    Attributes:
        version: another number whenever tensors were made anew: what was recorded with the old ones is void then.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        if slots < 1:
            raise ConfigError(f"slots = {slots}: expected at least 1")
        found = Attachment.of(model)
        if found is None:
            raise ConfigError("no delta is attached to this model, so that there is nothing to keep in tables")
        self.attachment, self.slots, self.version = found, slots, 0
        self._dtype = model.dtype
        self._tables: dict[_Key, Table] = {}
        self._idle: dict[_Key, Operands] = {}  # what changes nothing, of a table's sizes
        self._held: dict[str, _Held] = {}  # the least recently wanted first
        self._free = list(range(slots, 0, -1))
        self._sites: dict[frozenset[Kind] | None, SiteTables] = {}
        self._new = False  # tables that hooks do not read yet
        found.state.tables.add(self)

    @property
    def nbytes(self) -> int:
        """Memory of all tables."""
        return sum(tensor.nbytes for table in self._tables.values() for tensor in table.operands.values())

    def keeps(self, name: str) -> bool:
        """Whether the delta is in a slot that somebody uses."""
        return name in self._held and self._held[name].uses > 0

    def why_not(self, name: str) -> str | None:
        """Why a delta cannot be in tables, in a sentence; None where it can. Raises ConfigError: there is none of that
        name."""
        return why_not_in_tables(self.attachment, _attached(self.attachment, name))

    def put(self, name: str | None) -> int:
        """The slot of a delta, which is filled where it was not there; `take` gives it back. What a slot holds stays
        until another delta needs it. A delta that is in use is not detached.

        Raises:
            ConfigError: no such delta, one that cannot be in tables (`why_not`), or all slots are in use.
        """
        if name is None:
            return 0
        delta, held = _attached(self.attachment, name), self._held.pop(name, None)
        if held is not None and held.delta is delta:
            held.uses += 1
        else:
            if held is not None:  # another delta had this name
                self._free.append(held.slot)
            if (reason := self.why_not(name)) is not None:
                raise ConfigError(f"{reason}: route its rows in a batch of their own")
            held = _Held(self._free_slot(), delta)
            try:
                held.kinds = self._fill(held.slot, delta)
            except BaseException:  # no memory for larger tables
                self._free.append(held.slot)
                raise
            finally:
                self._publish()
        self._held[name] = held
        return held.slot

    def take(self, name: str | None) -> None:
        """The inverse of `put`. Raises ConfigError: the delta was not put, or taken as often."""
        if name is None:
            return
        if not self.keeps(name):
            raise ConfigError(f"delta {name!r} is in no slot that is used; put it first")
        self._held[name].uses -= 1

    def index_of(self, names: Sequence[str | None]) -> Tensor:
        """The slots of deltas that were put, int64 `[rows]`, on the device. Raises ConfigError: one was not."""
        if missing := [name for name in names if name is not None and name not in self._held]:
            raise ConfigError(f"delta {missing[0]!r} is in no slot; put it first")
        slots = [0 if name is None else self._held[name].slot for name in names]
        return torch.tensor(slots, device=self.attachment.model.device)

    @contextlib.contextmanager
    def routed(
        self, names: Sequence[str | None] | None, index: Tensor | None = None, *, cached: bool = False
    ) -> Iterator[None]:
        """Have each row read its slot inside the `with`, as `spectune.route` gives each its delta.

        Args:
            names: the delta of each row, all of them put; None with `cached`, where the index alone says it.
            index: slots, int64 `[rows]`, on the device; what is recorded reads it again at each replay. None: made of
                the names.
            cached: virtual tokens and prefixes are in the cache already, and positions and masks are the caller's:
                nothing is added or shifted.

        Raises:
            ConfigError: neither names nor an index, no names and not `cached`, or other tables of this model are being
                read.
        """
        if names is None and (index is None or not cached):
            raise ConfigError("a route over tables needs the names of its rows; with cached=True their slots suffice")
        rows = self.index_of(names or ()) if index is None else index
        with self.along(TableRoute(names, rows, cached=cached)):
            yield

    @contextlib.contextmanager
    def along(self, route: TableRoute, kinds: frozenset[Kind] | None = None) -> Iterator[None]:
        """The same with a route that was made before, again and again. `kinds`: nothing of other ones acts. Raises
        ConfigError: other tables of this model are being read."""
        if kinds not in self._sites:
            self._sites[kinds] = _by_site(self._tables, kinds)
        with self.attachment.sites.reading(self, self._sites[kinds]), self.attachment.state.routed(route):
            yield

    def kinds_of(self, names: Iterable[str | None]) -> frozenset[Kind]:
        """What acts on rows of these deltas, which are in slots."""
        found = set[Kind]()
        for name in set(names):
            if name is not None:
                found |= self._held[name].kinds
        return frozenset(found)

    def close(self) -> None:
        """Let go of all deltas and tables."""
        self.attachment.state.tables.discard(self)
        self._tables, self._idle, self._held, self._free = {}, {}, {}, list(range(self.slots, 0, -1))
        self._new = True
        self._publish()

    def _free_slot(self) -> int:
        if not self._free:
            unused = next((name for name, held in self._held.items() if not held.uses), None)
            if unused is None:
                raise ConfigError(f"all {self.slots} slots are in use by other deltas: take one, or make more slots")
            self._free.append(self._held.pop(unused).slot)
        return self._free.pop()

    @torch.no_grad()
    def _fill(self, slot: int, delta: Delta) -> frozenset[Kind]:
        """Write the delta's operands into a slot, where nothing else acts then. Returns their kinds."""
        written, own = list[tuple[Tensor, Tensor]](), set[_Key]()
        for site, module in delta.sites:
            if not isinstance(module, SideModule) or not isinstance(site, OutputSite):
                continue
            operands = module.operands()
            assert operands is not None, "why_not has looked"
            key = site.path, site.entry, module.alike()
            table = self._table(key, operands, module)
            table.filled.add(slot)
            if table.acts is not None:
                table.acts[slot] = True
            own.add(key)
            for name, operand in operands.items():
                place = table.operands[name][slot]
                place.zero_()
                written.append((place[tuple(map(slice, operand.shape))], operand))
        left = [key for key in self._tables if key not in own and slot in self._tables[key].filled]  # by another delta
        for key in left:
            written += [(self._tables[key].operands[name][slot], idle) for name, idle in self._idle[key].items()]
        if written:
            torch._foreach_copy_([place for place, _ in written], [operand for _, operand in written])
        for key in left:
            table = self._tables[key]
            table.filled.discard(slot)
            if table.acts is not None:
                table.acts[slot] = False
        return frozenset(kind for *_, kind in own)

    def _table(self, key: _Key, operands: Operands, module: SideModule) -> Table:
        """The table of a kind at a site, with room for these operands."""
        table = self._tables.get(key)
        shapes = {name: list(operand.shape) for name, operand in operands.items()}
        if table is not None:
            now = {name: list(tensor.shape[1:]) for name, tensor in table.operands.items()}
            shapes = {name: list(map(_room, now[name], shape)) for name, shape in shapes.items()}
            if now == shapes:
                return table
        idle = module.unchanging()
        assert idle is not None, "a module with operands has those that change nothing"
        nothing = {
            name: _filled_up(idle[name], shape, self._dtype if len(shape) > 1 else idle[name].dtype)
            for name, shape in shapes.items()
        }
        made = {name: _repeated(tensor, self.slots + 1) for name, tensor in nothing.items()}
        if table is not None:
            for name, tensor in table.operands.items():
                made[name][tuple(map(slice, tensor.shape))] = tensor
        acts = None if table is None else table.acts
        if table is None and key[-1].of.replaces_output:
            acts = torch.zeros(self.slots + 1, dtype=torch.bool, device=next(iter(made.values())).device)
        filled = set() if table is None else table.filled
        self._tables[key], self._idle[key] = Table(key[-1], made, acts, filled), nothing
        self._new = True
        return self._tables[key]

    def _publish(self) -> None:
        """Have the hooks read new tables, if there are any."""
        if self._new:
            self._new = False
            self.version += 1
            self._sites = {None: _by_site(self._tables, None)}
            self.attachment.sites.now_read(self, self._sites[None])


def why_not_in_tables(attachment: Attachment, delta: Delta) -> str | None:
    """Why a delta cannot be in tables, in a sentence; None where it can. It depends on the method and the base alone,
    and is found out once."""
    key = "in tables", delta.method
    if key not in attachment.proved:
        with torch.no_grad():
            reasons = (_why_not_there(attachment, site, module) for site, module in delta.sites)
            first = next((reason for reason in reasons if reason is not None), None)
        attachment.proved[key] = "trains the base itself" if delta.method.trains_base else first
    reason = attachment.proved[key]
    return None if reason is None else f"delta {delta.name!r} ({delta.method.label}) {reason}"


def gains_by_tables(attachment: Attachment, delta: Delta) -> bool:
    """Whether passes of a delta by itself, too, are faster over tables: its operands are costly. As
    `why_not_in_tables`, found out once."""
    key = "gains by tables", delta.method
    if key not in attachment.proved:
        costly = any(isinstance(module, SideModule) and module.costly for _, module in delta.sites)
        attachment.proved[key] = costly and why_not_in_tables(attachment, delta) is None
    return bool(attachment.proved[key])


def _attached(attachment: Attachment, name: str) -> Delta:
    delta = attachment.deltas.get(name)
    if delta is None:
        raise ConfigError(f"no delta {name!r} is attached; attached are: {', '.join(attachment.deltas)}")
    return delta


def _why_not_there(attachment: Attachment, site: Site, module: DeltaModule) -> str | None:
    if isinstance(module, AttentionModule | InputModule):
        return None
    if not isinstance(module, SideModule) or not isinstance(site, OutputSite) or site.on is not None:
        return f"changes a parameter itself ({site.path}), which all rows share"
    if attachment.family.gathers_tokens(site.path):
        return f"acts among experts ({site.path}), which are given tokens of any row"
    return None if module.has_row_form() else f"has no form by row ({site.path})"


def _by_site(tables: dict[_Key, Table], kinds: frozenset[Kind] | None) -> SiteTables:
    """Tables of these kinds, None: of all, by the side of a module that they act at."""
    found = defaultdict[tuple[str, bool], tuple[Table, ...]](tuple)
    for (path, entry, kind), table in tables.items():
        if kinds is None or kind in kinds:
            found[path, entry] += (table,)
    return found


def _room(now: int, wanted: int) -> int:
    """A size that is not enough grows to a power of two: another one of it may be in need of more soon."""
    return now if wanted <= now else 1 << (wanted - 1).bit_length()


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """`[count, ...]`. Of a matrix the longer side is contiguous: it is what neighbouring threads share."""
    turned = tensor.dim() == 2 and tensor.shape[0] > tensor.shape[1]
    made = (tensor.mT if turned else tensor).expand(count, *tensor.shape[:: -1 if turned else 1])
    made = made.clone(memory_format=torch.contiguous_format)
    return made.mT if turned else made


def _filled_up(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    made = tensor.new_zeros(shape, dtype=dtype)
    made[tuple(map(slice, tensor.shape))] = tensor
    return made
