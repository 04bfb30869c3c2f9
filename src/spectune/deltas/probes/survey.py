"""What of a base two tokens call, looked at before a delta's sites are settled.

Where the base does not call a module (it uses its parameters some other way), or where the output is not its linear map
(groups apart, a router's scores), a delta changes the parameter in place of the output, if it can.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from spectune.compute.evaluating import rehearsing
from spectune.deltas.attachment import Attachment
from spectune.deltas.method import Method, all_sites, module_at
from spectune.deltas.modules import SideModule
from spectune.deltas.open_sites import holder_of
from spectune.deltas.probes.base_runs import can_run, first_logits, run
from spectune.deltas.site import OutputSite, Site
from spectune.errors import first_line
from spectune.families import Family

log = logging.getLogger("spectune")


def settled_sites(attachment: Attachment, method: Method) -> list[Site]:
    """The method's sites on this base, each of one kind: at outputs, or at parameters where the base needs that."""
    sites = all_sites(method, attachment.family)
    if not can_run(attachment.model):
        return sites  # nothing can be run; the first real forward fails loudly where a module is missing
    calls = calls_of(attachment, [site for site in sites if isinstance(site, OutputSite)])
    written: set[str] = attachment.proved["overwritten"]
    settled: list[Site] = []
    for site in sites:
        # an expert that two tokens did not go to is called by others
        if isinstance(site, OutputSite) and not calls.get(site, attachment.family.gathers_tokens(site.path)):
            site = _at_parameter(site, method, attachment)
        elif isinstance(site, OutputSite) and site.path in written:
            site = replace(site, overwritten=True)
        settled.append(site)
    return settled


def calls_of(attachment: Attachment, sites: Sequence[OutputSite]) -> dict[OutputSite, bool]:
    """Which of the sites' modules the bare base calls for two tokens, and whether with outputs of their linear maps and
    the sites' widths. What was found is kept."""
    found: dict[OutputSite, bool | None] = attachment.proved.setdefault("calls", {})
    written: set[str] = attachment.proved.setdefault("overwritten", set())
    plain = {replace(site, on=None): site for site in sites}
    unknown = [site for site in plain if site not in found]
    if unknown:
        with attachment.state.routed(None):
            calls = _calls(attachment.model, {site.path: site for site in unknown}, written)
        found.update((site, calls.get(site.path)) for site in unknown)
    return {site: fits for plain_site, site in plain.items() if (fits := found[plain_site]) is not None}


def uncalled(model: PreTrainedModel, family: Family) -> list[str]:
    """Linears of the layers that two tokens do not call, in evaluation or not in training: the base uses their weights
    some other way. Experts in a list are left out, which others may call. Empty where the model cannot be run as it is.
    """
    if not can_run(model):
        return []
    sites = {t.path: OutputSite(t.path, t.in_features, t.out_features) for t in family.linears}
    try:
        called = _calls(model, sites, set())
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        log.warning(
            "%s cannot be run on two tokens as it is loaded: whether it calls all of its linears is not known (%s)",
            type(model).__name__, first_line(error),
        )  # fmt: skip
        return []
    return [path for path in sites if path not in called and not family.gathers_tokens(path)]


def _at_parameter(site: OutputSite, method: Method, attachment: Attachment) -> OutputSite:
    """The site with the host's parameter that is changed in place of its output; as it is where that cannot be."""
    with torch.device("meta"):
        module = module_at(method, site)
    name = module.acts_on if isinstance(module, SideModule) else None
    parameter = None if name is None else getattr(attachment.model.get_submodule(site.path), name, None)
    if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
        return site
    return site if holder_of(site.path, attachment.family) is None else replace(site, on=name)


def _calls(model: PreTrainedModel, wanted: dict[str, OutputSite], written: set[str]) -> dict[str, bool]:
    """Which of the modules are called for two tokens, and whether with tensors of their sites' widths. Some are called
    in evaluation and not in training: these count as not called. Those whose output is written into are put into
    `written`."""
    if not wanted:
        return {}
    found = _calls_now(model, wanted, written)
    try:
        in_training = _calls_now(model, wanted, written, training=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # some types want more than a text there; what trains them meets that itself
        return found
    return {path: fits for path, fits in found.items() if path in in_training}


def _calls_now(
    model: PreTrainedModel, wanted: dict[str, OutputSite], written: set[str], *, training: bool = False
) -> dict[str, bool]:
    found: dict[str, bool] = {}
    outputs: list[tuple[str, Tensor, int]] = []

    def seen(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if type(output) in (tuple, list) else output
            wide = isinstance(first, Tensor) and first.shape[-1:] == (wanted[path].out_features,)
            found[path] = wide and _is_its_linear_map(module, args, first)
            if isinstance(first, Tensor) and not first.is_inference():
                outputs.append((path, first, first._version))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(seen(path)) for path in wanted]
    try:
        if training:
            with rehearsing(model, model.device):
                first_logits(model, [0, 1])
        else:
            run(model, [0, 1])
    finally:
        for handle in handles:
            handle.remove()
    written |= {path for path, output, version in outputs if output._version != version}
    return found


def _is_its_linear_map(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a linear's output is its linear map. One of a class of its own may give something that is made of it
    (routers give scores of the chosen experts)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    weight, bias, x = module.weight, module.bias, args[0] if args else None
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and isinstance(x, Tensor)
    if not plain or x is None or x.shape[-1] != weight.shape[1]:
        return True  # quantised ones are of classes of their own too, and linear maps
    made = F.linear(x.to(weight.dtype), weight, bias)
    return made.shape == output.shape and torch.allclose(made.float(), output.float(), rtol=1e-2, atol=1e-3)
