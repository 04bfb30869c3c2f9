"""The proof at attach: every site of a delta is reached by a text, and gradients come to its weights."""

import logging

import torch
from torch import nn

from spectune.compute.evaluating import evaluating
from spectune.deltas.attachment import Attachment
from spectune.deltas.delta import Delta
from spectune.deltas.hooks.attention_function import PREFIX, implementation
from spectune.deltas.probes.base_runs import attention_calls, can_run, first_logits
from spectune.deltas.probes.survey import calls_of
from spectune.deltas.site import AttentionSite, OutputSite
from spectune.errors import NAMED, ConfigError, SpectuneError, first_line, some

log = logging.getLogger("spectune")


def prove_that_sites_fire(attachment: Attachment, delta: Delta, *, gradients: bool = True) -> None:
    """Run a few tokens through the model and check that each of the delta's sites is reached, and `gradients` each
    weight. What was proved at the same sites, and of gradients for the same method there, is not proved again. Raises
    ConfigError: a module is never called, an attention module does not go through the registered attention function, or
    no gradient comes to any weight; all of them are named."""
    if not can_run(attachment.model):
        return  # nothing can be run; the first real forward fails loudly where a module is missing
    outputs = [site for site, _ in delta.sites if isinstance(site, OutputSite)]
    calls = calls_of(attachment, outputs)
    _warn_of_dropout(delta)
    _check_widths(attachment, delta, calls)
    names = () if delta.method.trains_base else tuple(name for name, _ in delta.named_parameters())
    # the function that knows prefixes computes what the plain one computes, but for those
    attention = implementation(attachment.model).removeprefix(PREFIX)
    runs = "runs", attention, frozenset(site for site, _ in delta.sites)
    reach = "reached", attention, type(delta.method), names
    proved = attachment.proved
    if runs not in proved:
        proved[runs] = set(attention_calls(attachment.model, [0, 1]))
    if gradients and reach not in proved:
        proved[reach] = _reached_by_gradients(attachment, delta)
    reached: set[str] | None = proved.get(reach)
    _check_reached(attachment, delta, calls, proved[runs], reached)
    _report_unreached(attachment, delta, reached)


def _warn_of_dropout(delta: Delta) -> None:
    with_dropout = [
        site.path
        for site, module in delta.sites
        if isinstance(site, OutputSite) and site.on and any(isinstance(m, nn.Dropout) for m in module.modules())
    ]
    if with_dropout:
        log.warning(
            "%s: dropout does not act at %s: the base uses these weights without a call whose input could be dropped",
            delta.method.label, some(with_dropout),
        )  # fmt: skip


def _check_widths(attachment: Attachment, delta: Delta, calls: dict[OutputSite, bool]) -> None:
    misfits = [site for site, fits in calls.items() if not fits and site.on is None]
    if misfits:
        raise ConfigError(
            f"{delta.method.label} is refused: "
            + "; ".join(f"{s.path} does not give tensors of {s.out_features} features" for s in misfits[:NAMED])
            + f" ({len(misfits)} in all): this {attachment.family.model_type} model works on several streams or groups "
            "there. Choose other targets or another placement, or another method."
        )


def _check_reached(
    attachment: Attachment, delta: Delta, calls: dict[OutputSite, bool], attended: set[int], reached: set[str] | None
) -> None:
    """Raise ConfigError where a site is never reached; an expert that two tokens did not go to is called by others."""
    model, family = attachment.model, attachment.family
    outputs = [site for site, _ in delta.sites if isinstance(site, OutputSite)]
    never_called = [site.path for site in outputs if site.on is None and site not in calls]
    if reached:
        never_called += [
            site.path for site in outputs if site.on and not any(name.startswith(site.path + ".") for name in reached)
        ]
    never_called = [path for path in never_called if not family.gathers_tokens(path)]
    bypassing = [
        site.path
        for site, _ in delta.sites
        if isinstance(site, AttentionSite) and id(model.get_submodule(site.path)) not in attended
    ]
    if never_called or bypassing:
        lines = [f"{path}: is never called in a forward pass" for path in never_called]
        lines += [f"{path}: does not use the attention function set by set_attn_implementation" for path in bypassing]
        raise ConfigError(
            f"{delta.method.label} would not act on every site of this {family.model_type} model:\n"
            + "\n".join(lines)
            + "\nChoose other targets, or another method."
        )


def _reached_by_gradients(attachment: Attachment, delta: Delta) -> set[str] | None:
    """The delta's weights that the logits depend on in a differentiable way; None where that cannot be found out (no
    gradients may be taken now, or the base has no backward pass, which is for inference alone)."""
    named = {} if delta.method.trains_base else dict(delta.named_parameters())
    if not named or torch.is_inference_mode_enabled():
        return None
    model = attachment.model
    before = {name: p.requires_grad for name, p in named.items()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            logits = first_logits(model, [0, 1, 0, 1])
            if not logits.requires_grad:
                return set()
            gradients = torch.autograd.grad(logits.float().sum(), list(named.values()), allow_unused=True)
    except (torch.OutOfMemoryError, SpectuneError):
        raise
    except RuntimeError as error:  # what trains it meets the same
        log.info("%s: no backward pass through this base: %s", delta.method.label, first_line(error))
        return None
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _report_unreached(attachment: Attachment, delta: Delta, reached: set[str] | None) -> None:
    """Raise ConfigError where no gradient comes to any weight; warn of single ones."""
    if reached is None:
        return
    label, family = delta.method.label, attachment.family
    if not reached:
        raise ConfigError(
            f"{label} is refused: no gradient comes from the logits of this {family.model_type} model to any of its "
            "weights (its own code takes them off the graph), so nothing would be trained. Use full fine-tuning or "
            "another model."
        )
    names = [name for name, _ in delta.named_parameters()]
    still = [name for name in names if name not in reached and not family.gathers_tokens(name.rpartition(".")[0])]
    if still:
        log.warning(
            "%s: %d of its %d tensors get no gradient from this %s model and stay as they are: what they change is "
            "only which tokens or experts are chosen, or is not used for the logits (%s)",
            label, len(still), len(names), family.model_type, some(still),
        )  # fmt: skip
