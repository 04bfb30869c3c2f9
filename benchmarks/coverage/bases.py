"""A tiny base of each type, with random weights, and what it does by itself: the yardstick of every check."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.coverage.configs import VOCABULARY, tiny_config
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectune.inference.generate import plain_config
from spectune.inference.modes import generation_defaults

#: logits of one row in a padded batch and alone (contract, point 3)
PADDING = 1e-4
#: logits with a cache and without
GENERATION = 1e-3
NEW_TOKENS = 4
#: of the rows of a batch (a multiple of the chunks that some types cut a text into)
LENGTH = 12


def all_types() -> list[str]:
    """The model types of the installed version's mapping of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class BaseFailsError(Exception):
    """The bare base cannot be built, run or trained here; the message is transformers' own."""


def config_of(model_type: str) -> PretrainedConfig:
    """The tiny config that the type's class takes: some classes take a part of their type's config."""
    config = tiny_config(model_type)
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class
    if isinstance(config, wanted):
        return config
    inner = [getattr(config, name) for name in config.sub_configs if isinstance(getattr(config, name), wanted)]
    return inner[0] if inner else config


def make(model_type: str) -> PreTrainedModel:
    """The same model each time, float32, in evaluation mode. Every weight is away from its special first values, so
    that nothing is hidden by zeros and ones."""
    config = config_of(model_type)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(tiny_config(model_type))]
    torch.manual_seed(7)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config) if known else kind(config)
    model = model.float().eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY - 2, (rows, length), generator=torch.Generator().manual_seed(seed))


def texts() -> list[Tensor]:
    """Two rows of unlike length."""
    return [tokens(1, 9)[0], tokens(1, 4, seed=6)[0]]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """`[rows, length, vocabulary]` of a plain forward pass, without cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    return found


def padding_error(model: PreTrainedModel, side: str, *, positions: bool) -> float:
    """The largest difference between logits of a row in a padded batch and alone, on real tokens."""
    rows = texts()
    ids, mask = padded(rows, side)
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    together = logits(model, ids, mask, **given)
    alone = [logits(model, row[None])[0] for row in rows]
    pairs = [(together[i][mask[i] == 1], one) for i, one in enumerate(alone)]
    return max(float((a - b).abs().max()) if a.isfinite().all() else float("inf") for a, b in pairs)


def generation_error(model: PreTrainedModel, seed: int = 5) -> float:
    """The largest difference between the logits that `generate` has with its cache and those of a plain forward pass
    over what it wrote. Infinite where it wrote another token than these say."""
    ids = tokens(2, 7, seed)
    config = plain_config(NEW_TOKENS, [], 0, output_logits=True, return_dict_in_generate=True)
    generate: Any = model.generate
    with torch.no_grad(), generation_defaults(model):
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    cached = torch.stack(out.logits, dim=1)
    plain = logits(model, out.sequences)[:, -NEW_TOKENS - 1 : -1]
    error = float((cached - plain).abs().max())
    top = plain.topk(2, dim=-1).values
    tied = top[..., 0] - top[..., 1] <= 2 * error
    same = (plain.argmax(-1) == out.sequences[:, -NEW_TOKENS:]) | tied
    return error if bool(same.all()) and error == error else float("inf")


@dataclass
class Bare:
    """What the bare base does in each check.

    Attributes:
        padding: by side, as `padding_error` gives it, with positions given where that is better.
        positions: position_ids are given with a padded batch, as `generate` does.
        generation: as `generation_error` gives it; None where `generate` does not run, `why` saying so.
        unreached: its weights that a text gives no gradient.
    """

    padding: dict[str, float] = field(default_factory=dict)
    positions: bool = False
    generation: float | None = None
    why: str = ""
    parameters: int = 0
    unreached: list[str] = field(default_factory=list)


def measure(model_type: str) -> Bare:
    """Run the bare base.

    Raises:
        BaseFailsError: it cannot be built, run or trained.
    """
    try:
        model = make(model_type)
        first = logits(model, tokens(2, LENGTH))
        again = logits(model, tokens(2, LENGTH))
        model.train()
        ids = tokens(2, LENGTH)
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        unreached = [name for name, gradient in named if gradient is None or not bool(gradient.any())]
        model.zero_grad(set_to_none=True)
        model.eval()
    except Exception as error:
        raise BaseFailsError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if first.shape[:2] != (2, LENGTH):
        raise BaseFailsError(f"its logits of 2 rows of {LENGTH} tokens are {list(first.shape)}")
    if not first.isfinite().all():
        raise BaseFailsError("its logits are not finite")
    if not torch.equal(first, again):
        raise BaseFailsError("two forward passes of one batch give different logits")
    bare = Bare(parameters=sum(p.numel() for p in model.parameters()), unreached=unreached)
    changed = tokens(2, LENGTH)
    changed[:, -1] = 1
    if float((logits(model, changed) - first)[:, :-1].abs().max()) > PADDING:
        bare.why = "its logits depend on later tokens"
    takes = "position_ids" in inspect.signature(model.forward).parameters
    for side in ("right", "left"):
        bare.padding[side] = padding_error(model, side, positions=False)
    if takes and max(bare.padding.values()) > PADDING:
        try:
            given = {side: padding_error(model, side, positions=True) for side in ("right", "left")}
        except Exception:
            given = bare.padding
        if max(given.values()) < max(bare.padding.values()):
            bare.padding, bare.positions = given, True
    try:
        bare.generation = generation_error(model)
    except Exception as error:
        bare.why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return bare
