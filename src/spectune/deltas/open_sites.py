"""The sites of a base where deltas act: each opened once, for all deltas, and closed with its last user."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.hooks import attention_function
from spectune.deltas.hooks.entry import EntryHook
from spectune.deltas.hooks.module_side import SideHook
from spectune.deltas.hooks.output import OutputHook
from spectune.deltas.hooks.parameter import ParameterHook
from spectune.deltas.layout import BatchLayout
from spectune.deltas.site import AttentionSite, InputSite, OutputSite, ParameterSite, Site
from spectune.deltas.table_route import SiteTables
from spectune.errors import ConfigError
from spectune.families import Family


class OpenSites:
    """The hooks of one model, with how many deltas use each."""

    def __init__(self, model: PreTrainedModel, family: Family, state: ForwardState) -> None:
        self.model, self.family, self.state = model, family, state
        self._sides: dict[tuple[str, bool], tuple[SideHook, int]] = {}
        self._parameters: dict[str, ParameterHook] = {}
        self._attention_users: dict[str, tuple[nn.Module, int]] = {}
        self._attention_before: str | None = None
        self._tables: SiteTables = {}
        self._reader: weakref.ref[Any] | None = None  # whose tables these are
        self._readers = 0  # routes over them that are in force

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_reader": None, "_readers": 0}  # a copied model begins with no tables

    def open(self, site: Site) -> None:
        """Let deltas act at a site. Raises ConfigError: attention cannot be exchanged, or a parameter cannot be changed
        where it is."""
        match site:
            case OutputSite(on=None, path=path, entry=entry):
                hook, users = self._sides.get((path, entry), (None, 0))
                if hook is None:
                    gathers, kind = self.family.gathers_tokens(path), EntryHook if entry else OutputHook
                    hook = kind(self.model.get_submodule(path), path, self.state, gathers_tokens=gathers)
                    hook.tables = self._tables.get((path, entry), ())
                self._sides[path, entry] = hook, users + 1
            case OutputSite(path=owner, on=str(name)) | ParameterSite(host=owner, name=name):
                self._open_parameter(owner, name)
            case AttentionSite(path=path):
                self.open_attention(path, "prefix tuning")
            case InputSite():
                pass  # the decoder's hooks are there from the first attach

    def close(self, site: Site) -> None:
        """The inverse of `open`."""
        match site:
            case OutputSite(on=None, path=path, entry=entry):
                hook, users = self._sides.pop((path, entry))
                if users > 1:
                    self._sides[path, entry] = hook, users - 1
                else:
                    hook.close()
            case OutputSite(path=owner, on=str(name)) | ParameterSite(host=owner, name=name):
                holder = holder_of(owner, self.family)
                assert holder is not None, "it was opened"
                if self._parameters[holder].close(owner.removeprefix(holder).removeprefix("."), name):
                    del self._parameters[holder]
            case AttentionSite(path=path):
                self.close_attention(path)

    def open_attention(self, path: str, what: str) -> None:
        """Let the attention module at `path` find the forward state; the first one switches the model's attention to
        the registered function that knows prefixes and packs. `what`: needs it, for the message of a refusal."""
        if self._attention_before is None:
            self._attention_before = attention_function.switch_on(self.model, what)
        module, users = self._attention_users.get(path, (None, 0))
        if module is None:
            module = self.model.get_submodule(path)
            attention_function.listen(module, self.state)
        self._attention_users[path] = module, users + 1

    def close_attention(self, path: str) -> None:
        """The inverse of `open_attention`; with the last one the model's own attention function is set again."""
        module, users = self._attention_users.pop(path)
        if users > 1:
            self._attention_users[path] = module, users - 1
        else:
            attention_function.stop_listening(module)
        if not self._attention_users and self._attention_before is not None:
            self.model.set_attn_implementation(self._attention_before)
            self._attention_before = None

    def keep_attention(self) -> None:
        """Switch again where somebody set another attention function after attach (or on another model that shares
        this one's config object): else the prefix would be left out in silence."""
        if self._attention_before is not None and not attention_function.is_on(self.model):
            self._attention_before = attention_function.switch_on(self.model)

    def prepare(self, layout: BatchLayout | None) -> None:
        """Find out what acts where on the rows of a batch, before blocks run; None: forget it, with the modules."""
        for hook, _ in list(self._sides.values()):  # a route may end while another thread attaches
            hook.prepare(layout)

    @contextlib.contextmanager
    def reading(self, owner: object, tables: SiteTables) -> Iterator[None]:
        """Inside, routes over the tables of `owner` find these. Raises ConfigError: those of another owner are read."""
        own, before = self._reader is not None and self._reader() is owner, self._tables
        if self._readers and not own:
            raise ConfigError("other tables of this model are being read, and its hooks hold one owner's at a time")
        if not own:
            self._reader = weakref.ref(owner, lambda _: self._show({}))
        if before is not tables:
            self._show(tables)
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if self._readers and before is not tables and self._tables is tables:
                self._show(before)

    def now_read(self, owner: object, tables: SiteTables) -> None:
        """Give the hooks other tables of the owner whose they have; nothing of anybody else's."""
        if self._reader is not None and self._reader() is owner:
            self._show(tables)

    def _show(self, tables: SiteTables) -> None:
        self._tables = tables
        for site, (hook, _) in list(self._sides.items()):
            hook.tables = tables.get(site, ())

    def running(self) -> list[ParameterHook]:
        """Hooks of the layers that run now."""
        return [hook for hook in self._parameters.values() if hook.running]

    def _open_parameter(self, owner: str, name: str) -> None:
        holder = holder_of(owner, self.family)
        if holder is None:
            raise ConfigError(
                f"{owner}.{name} is refused: it is not what its module adds last, and stands outside of the decoder, "
                "so that it cannot be changed for a forward pass. Use another method, such as LoRA."
            )
        if holder not in self._parameters:
            self._parameters[holder] = ParameterHook(self.model.get_submodule(holder), holder, self.state)
        self._parameters[holder].open(owner.removeprefix(holder).removeprefix("."), name)


def holder_of(owner: str, family: Family) -> str | None:
    """The layer around a module, whose parameters can be changed while that layer runs; else the decoder; None outside
    of both."""
    around = [layer.path for layer in family.layers] + [family.decoder]
    return next((path for path in around if owner == path or owner.startswith(path + ".")), None)
