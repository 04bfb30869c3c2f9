"""Running a base on a few tokens: which keys and values text makes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.deltas.attachment import Attachment
from spectune.deltas.hooks.attention_function import implementation
from spectune.deltas.hooks.caches import caches_in
from spectune.deltas.probes.agreement import logits_of
from spectune.errors import ConfigError, SpectuneError, first_line
from spectune.families import token_embedding


def can_run(model: nn.Module) -> bool:
    """Whether the base has weights to run with: none stands on the meta device."""
    attachment = Attachment.of(model)
    modules = model.modules() if attachment is None else attachment.base_modules
    return not any(p.device.type == "meta" for module in modules for p in module.parameters(recurse=False))


def proved_as_routed(model: PreTrainedModel, *question: object) -> tuple[dict[Any, Any], object]:
    """What has been proved of a base while deltas are on it, and the key of this question about it as it is routed
    now: the same for all deltas of a method with the same settings, for what they have learned decides nothing. Another
    attention or dropout than before is another question."""
    attachment = Attachment.of(model)
    if attachment is None:
        return {}, question
    methods = [None if name is None else attachment.deltas[name].method for name in attachment.state.current.names]
    settings = tuple((type(method), "" if method is None else method.model_dump_json()) for method in methods)
    return attachment.proved, (*question, settings, implementation(model), _dropout(attachment))


def _dropout(attachment: Attachment) -> frozenset[float]:
    """The probabilities of dropout that there are in the model."""
    found = set[float]()
    for module in attachment.model.modules():
        values = [module.p] if isinstance(module, nn.Dropout) else [getattr(module, "attention_dropout", None)]
        found.update(value for value in values if isinstance(value, float))
    return frozenset(found)


def run(model: PreTrainedModel, ids: list[int]) -> None:
    """Run the model on one row of token ids, in evaluation mode."""
    attachment = Attachment.of(model)
    with evaluating(model, None if attachment is None else attachment.modules_in_force()):
        first_logits(model, ids)


def first_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits `[1, len(ids), vocabulary]` of one row, without cache. Raises ConfigError: the model's own code fails on
    it with the delta that is on now, and without it does not."""
    tokens = torch.tensor([ids], device=token_embedding(model).weight.device)
    forward = functools.partial(logits_of, model, tokens, torch.ones_like(tokens))
    attachment = Attachment.of(model)
    name = None if attachment is None else attachment.state.current.name
    try:
        return forward()
    except (SpectuneError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if attachment is None or name is None or not _runs_bare(attachment, forward):
            raise
        raise ConfigError(
            f"{attachment.deltas[name].method.label} is refused: this {attachment.family.model_type} model's own code "
            f"does not take it ({type(error).__name__}: {first_line(error)}). The bare model runs. Use another method, "
            "such as LoRA."
        ) from error


def _runs_bare(attachment: Attachment, forward: Callable[[], Tensor]) -> bool:
    if attachment.tuned is not None:
        return False  # it is the base: what fails is the model's own
    try:
        with attachment.state.routed(None):
            forward()
    except Exception:
        return False
    return True


def attention_calls(model: PreTrainedModel, ids: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values `[1, kv_heads, len(ids), dim]` that each open attention module uses for one row under the current
    route, by the module's id: taken where attention uses them, after rotary positions."""
    attachment = Attachment.of(model)
    assert attachment is not None, "attention modules are open only while something is attached"
    thread = attachment.state.thread
    calls: dict[int, tuple[Tensor, Tensor]] = {}
    thread.attention_calls = calls
    try:
        run(model, ids)
    finally:
        thread.attention_calls = None
    return calls


def capture_keys_and_values(
    model: PreTrainedModel, paths: list[str], ids: list[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The keys and values `[kv_heads, len(ids), dim]` float32 that the bare base makes of a text, for each attention
    module at `paths`, which must be open attention sites."""
    attachment = Attachment.of(model)
    assert attachment is not None, "capture is called from initialise, when something is attached"
    with attachment.state.routed(None):
        calls = attention_calls(model, ids)
    modules = {path: model.get_submodule(path) for path in paths}
    return {
        path: (calls[id(module)][0][0].float(), calls[id(module)][1][0].float())
        for path, module in modules.items()
        if id(module) in calls
    }


def cached_values(model: PreTrainedModel, watched: list[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What modules at `watched` give for three tokens, `[3, features]`, and the values that the bare base then caches,
    layer by layer, `[3, kv_heads * dim]`: values go from their projection into the cache unchanged."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda module, args, output: seen.__setitem__(path, output.detach()[0])

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in watched]
    try:
        with evaluating(model):
            tokens = torch.tensor([[1, 2, 3]], device=token_embedding(model).weight.device)
            attachment = Attachment.of(model)
            # a model with a head may not say what was cached
            headed = attachment is not None and attachment.family.trained_head
            out = (model.base_model if headed else model)(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True
            )
    finally:
        for handle in handles:
            handle.remove()
    layers = [layer for cache in caches_in(out) for layer in getattr(cache, "layers", [])]
    return seen, [
        layer.values[0].transpose(0, 1).flatten(1) for layer in layers if getattr(layer, "values", None) is not None
    ]
