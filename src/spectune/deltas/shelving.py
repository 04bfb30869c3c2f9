"""Deltas that come and go on one base: taken off with their weights kept in host memory, and put on again."""

import contextlib
import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from spectune.compute.usual_settings import usual_settings
from spectune.deltas.absent_weights import refuse_absent_weights
from spectune.deltas.attaching import check_can_attach, make_hooks_visible_to_the_compiler, prove_method, unused
from spectune.deltas.attachment import Attachment
from spectune.deltas.delta import Delta, ModuleDelta
from spectune.deltas.foreign_layers import refuse_foreign_layers
from spectune.deltas.method import Method, all_sites
from spectune.deltas.probes.base_runs import can_run
from spectune.deltas.probes.survey import calls_of
from spectune.deltas.site import OutputSite
from spectune.errors import ConfigError

log = logging.getLogger("spectune")


def hold_base(model: PreTrainedModel, methods: Sequence[Method]) -> Attachment:
    """The attachment of a base, which stays when its last delta goes, until its `holders` are one less. What deltas of
    these `methods` need to know of the base is found out now. Raises ConfigError: nothing can be attached to this base,
    it is fully tuned, or it has a head that deltas have copies of."""
    found = Attachment.of(model)
    if found is None:
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
        refuse_foreign_layers(model)
        refuse_absent_weights(model, "a bank of deltas", trains_base=False)
        make_hooks_visible_to_the_compiler()
    with usual_settings(model.device):
        attachment = found or Attachment(model)
        attachment.holders += 1
        try:
            _look_at(attachment, methods)
        except BaseException:
            attachment.holders -= 1
            attachment.close_unused()
            raise
    return attachment


def _look_at(attachment: Attachment, methods: Sequence[Method]) -> None:
    if attachment.tuned is not None:
        raise ConfigError(
            f"the base is fully tuned as {attachment.tuned.name!r}, and no other delta can stand beside it: detach it"
        )
    family = attachment.family
    if heads := [head.path for head in family.trained_head]:
        raise ConfigError(
            f"{type(attachment.model).__name__} has a head of its own ({', '.join(heads)}), of which every delta has a "
            "copy: a bank is for causal language models. Attach its deltas with spectune.load_delta"
        )
    assert attachment.facts.identity is not None, "the attachment has made it"
    _ = attachment.facts.identity.fingerprint  # each folder is compared with it
    sites = dict[OutputSite, None]()
    for method in methods:
        try:
            sites |= {site: None for site in all_sites(method, family) if isinstance(site, OutputSite)}
        except ConfigError as error:  # a folder of this method's says it again
            log.debug("%s: %s", method.label, error)
    if can_run(attachment.model):
        calls_of(attachment, list(sites))
        for method in methods:
            with contextlib.suppress(ConfigError):  # a folder of this method's meets it again
                prove_method(attachment, method)


def set_aside(model: PreTrainedModel, name: str) -> Delta:
    """Take delta `name` off as `detach` does, and move its weights to host memory: `put_back` puts them on again, bit
    for bit. Raises ConfigError as `detach`, and for a fully tuned base."""
    attachment, delta = unused(model, name)
    if not isinstance(delta, ModuleDelta):
        raise ConfigError(f"delta {name!r} is the base itself ({delta.method.label}), which cannot be set aside")
    delta.set_aside()
    attachment.remove(delta)
    delta.to_host()
    return delta


def put_back(delta: Delta) -> bool:
    """Put a delta on again that `set_aside` took off; it is not made the active one, and nothing is proved again. False
    where something else stands at a place of it now: nothing is put on then. Raises ConfigError: its name is taken."""
    assert isinstance(delta, ModuleDelta), "set_aside takes no other"
    check_can_attach(delta.model, delta.method, delta.name)
    sites = delta.sites_aside()
    if sites is None:
        return False
    attachment = Attachment.of(delta.model) or Attachment(delta.model)
    try:
        attachment.add(delta, sites)
    except BaseException:
        attachment.remove(delta, undo=True)
        delta.to_host()
        raise
    return True


def is_aside(delta: Delta) -> bool:
    """Whether a delta is off the model, and can be put back."""
    return isinstance(delta, ModuleDelta) and not delta.sites and delta.sites_aside() != []
