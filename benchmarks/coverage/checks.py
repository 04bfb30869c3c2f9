"""What every method has to show on every type: the checks of issue "any causal language model", one function each.

Each check returns None where it holds, or what is wrong in words. A check that the bare base does not hold itself is
not held against the method: it is noted (`as the base`), and the method may not make it worse.
"""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.coverage.bases import (
    GENERATION,
    LENGTH,
    PADDING,
    Bare,
    generation_error,
    logits,
    make,
    padding_error,
    tokens,
)
from benchmarks.coverage.configs import tiny_config
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas import Delta, Method, attach, detach
from spectune.errors import SpectuneError
from spectune.methods import (
    IA3,
    OFT,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    LNTuning,
    LoRA,
    MiSS,
    PrefixTuning,
    PromptTuning,
)
from spectune.objectives import CAUSAL_LM
from spectune.planning.counts import count
from spectune.storage import load_delta

METHODS: dict[str, Method] = {
    "full": FullFineTuning(),
    "adapter": BottleneckAdapter(bottleneck_dim=8, dropout=0.0),
    "lora": LoRA(r=4, lora_alpha=8),
    "bitfit": BitFit(),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "dora": DoRA(r=4, lora_alpha=8),
    "ia3": IA3(),
    "oft": OFT(oft_block_size=8),
    "miss": MiSS(r=4),
    "ln": LNTuning(),
}
#: tried one after the other until two steps lower the loss
LEARNING_RATES = (1e-2, 1e-3, 1e-4, 1e-5)
#: what a method may add to an error that the base has by itself
_FACTOR = 3.0

WORKS, REFUSED, DEFECT = "works", "refused", "defect"


@dataclass
class Found:
    """The result of one method on one type."""

    status: str = WORKS
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    as_base: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def check(model_type: str, case: str, bare: Bare) -> Found:
    """Every check of one method on one type."""
    found, method = Found(), METHODS[case]
    model = make(model_type)
    before = _state(model)
    try:
        with _notices(found):
            delta = _put_on(model, method)
    except SpectuneError as error:
        found.status, found.reason = REFUSED, str(error)
        problem = _restored(model, before)
        if problem:
            found.status, found.problems = DEFECT, [f"after the refusal: {problem}"]
        return found
    except Exception as error:
        found.status, found.problems = DEFECT, [f"attach: {_told(error)}"]
        return found
    run = _Run(model_type, method, model, delta, bare, before, found)
    for name in ("identity", "counts", "training", "folder", "generation", "padding", "detaching"):
        try:
            problem = getattr(run, name)()
        except SpectuneError as error:
            problem = f"refused late: {error}"
        except Exception as error:
            problem = _told(error)
        if problem:
            found.problems.append(f"{name}: {problem}")
    if found.problems:
        found.status = DEFECT
    return found


@dataclass
class _Run:
    model_type: str
    method: Method
    model: PreTrainedModel
    delta: Delta
    bare: Bare
    before: dict[str, Any]
    found: Found

    def identity(self) -> str | None:
        """Equal to the base bit for bit where the method starts there; else not."""
        same = torch.equal(logits(self.model, tokens(2, LENGTH)), self.before["logits"])
        if same is not self.method.starts_at_identity:
            return "the first logits are " + ("the base's" if same else "not the base's")
        return None

    def counts(self) -> str | None:
        """The plan's parameter counts against what is there."""
        planned = count(tiny_config(self.model_type), self.method)
        stored = sum(t.numel() for t in self.delta.state_dict().values())
        trained = sum(p.numel() for p in self.delta.parameters())
        real = (stored, trained, self.bare.parameters)
        self.found.numbers["parameters"] = stored
        if (planned.stored, planned.trained, planned.base) != real:
            return f"planned {planned}, really {real}"
        if (self.delta.num_parameters(), self.delta.num_trained_parameters()) != real[:2]:
            return f"the delta says {self.delta.num_parameters()}, really {stored}"
        if stored == 0:
            return "nothing is trained"
        return None

    def training(self) -> str | None:
        """Two steps lower the loss of the same batch, every weight moves, no base weight does."""
        first = {name: t.clone() for name, t in self.delta.training_state_dict().items()}
        tried = []
        for rate in LEARNING_RATES:
            self.delta.load_training_state_dict(first)
            losses = self._two_steps(rate)
            tried.append(f"{losses[0]:.5f} -> {losses[1]:.5f}")
            if losses[1] < losses[0]:
                break
        else:
            return f"two steps do not lower the loss at any rate: {'; '.join(tried)}"
        self.found.numbers["loss"] = tried[-1]
        still = [n for n, t in self.delta.training_state_dict().items() if torch.equal(t, first[n])]
        if self.method.trains_base:
            excused = [name for name in still if name in self.bare.unreached]
            if excused:
                self.found.as_base.append(f"{len(excused)} of {len(first)} tensors get no gradient from a text")
        else:  # the user was told of them
            told = [notice for notice in self.found.notices if "get no gradient" in notice]
            excused = still if told and f" {len(still)} of its {len(first)} tensors" in told[0] else []
        still = [name for name in still if name not in excused]
        if still:
            return f"{len(still)} of {len(first)} trained tensors did not move: {', '.join(still[:12])}"
        if not self.method.trains_base:
            own = {id(p) for p in self.delta.parameters()}
            moved = [n for n, p in self.model.named_parameters() if p.grad is not None and id(p) not in own]
            if moved:
                return f"base weights got gradients: {', '.join(moved[:5])}"
        return None

    def _two_steps(self, rate: float) -> tuple[float, float]:
        batch = {"input_ids": tokens(2, LENGTH), "attention_mask": torch.ones(2, LENGTH).long()}
        batch["labels"] = batch["input_ids"]
        optimizer = torch.optim.Adam(self.delta.parameters(), lr=rate)

        def loss() -> Tensor:
            total, number = CAUSAL_LM.loss_sum(self.model, batch)
            return total / number

        self.model.train()
        try:
            for step in range(2):
                optimizer.zero_grad()
                now = loss()
                if step == 0:
                    begin = float(now.detach())
                now.backward()
                optimizer.step()
            with torch.no_grad():
                end = float(loss())
        finally:
            self.model.eval()
            optimizer.zero_grad()
        return begin, end

    def folder(self) -> str | None:
        """Saved, loaded elsewhere: the same logits bit for bit."""
        expected = logits(self.model, tokens(2, LENGTH))
        with tempfile.TemporaryDirectory() as folder:
            self.delta.save(Path(folder) / "task")
            elsewhere = make(self.model_type)
            # trainable, as the first one is: how torch folds products of 4-D tensors, and rounds, depends on that
            load_delta(elsewhere, Path(folder) / "task", name="again", trainable=True)
        got = logits(elsewhere, tokens(2, LENGTH))
        if torch.equal(got, expected):
            return None
        return f"logits after loading differ by {float((got - expected).abs().max()):.2g}"

    def generation(self) -> str | None:
        """What `generate` writes with its cache is what plain forward passes give."""
        base = self.bare.generation
        if base is None:
            self.found.as_base.append(f"generate: {self.bare.why}")
            return None
        if base == float("inf"):
            self.found.as_base.append("generate: with its cache it writes other tokens than without")
            return None
        try:
            error = generation_error(self.model)
            if error > GENERATION:  # which of two equal experts or tokens is chosen hangs on the length: other texts
                error = min(error, *(generation_error(self.model, seed) for seed in (6, 7)))
        except SpectuneError as refusal:
            if base <= GENERATION:
                raise
            self.found.as_base.append(f"generate: {refusal}")
            return None
        if error <= GENERATION:
            return None
        if base > GENERATION and error <= _FACTOR * base:
            self.found.as_base.append(f"generate: with its cache its logits differ by {error:.2g} (base {base:.2g})")
            return None
        return f"with a cache logits differ by {error:.2g} from those without (base {base:.2g})"

    def padding(self) -> str | None:
        """Left and right padding change nothing on real tokens."""
        positions = self.bare.positions and self.method.virtual_tokens == 0
        wrong = []
        for side, base in self.bare.padding.items():
            error = padding_error(self.model, side, positions=positions)
            if error <= PADDING:
                continue
            if base > PADDING and error <= _FACTOR * base:
                self.found.as_base.append(f"padding on the {side}: {error:.2g} (base {base:.2g})")
            else:
                wrong.append(f"{side}: {error:.2g} (base {base:.2g})")
        return "; ".join(wrong) or None

    def detaching(self) -> str | None:
        """The base is what it was."""
        detach(self.model, "task")
        return _restored(self.model, self.before)


def _put_on(model: PreTrainedModel, method: Method) -> Delta:
    return attach(model, method, "task", seed=3, keep_base=method.trains_base)


def _state(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": _hooks(model),
        "attention": model.config.get_text_config()._attn_implementation,
        "logits": logits(model, tokens(2, LENGTH)),
    }


def _restored(model: PreTrainedModel, before: dict[str, Any]) -> str | None:
    """What is not as it was, bit for bit."""
    now = model.state_dict()
    if list(now) != list(before["tensors"]):
        return f"other tensors: {sorted(set(now) ^ set(before['tensors']))[:5]}"
    changed = [name for name, t in before["tensors"].items() if not torch.equal(t, now[name])]
    if changed:
        return f"changed: {', '.join(changed[:5])}"
    if {name: p.requires_grad for name, p in model.named_parameters()} != before["grad"]:
        return "requires_grad differs"
    if _hooks(model) != before["hooks"]:
        return "hooks are left"
    if model.config.get_text_config()._attn_implementation != before["attention"]:
        return f"attention is {model.config.get_text_config()._attn_implementation}"
    if not torch.equal(logits(model, tokens(2, LENGTH)), before["logits"]):
        return "other logits"
    return None


def _hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "spectune" in f.filename]
    where = f"{Path(last.filename).name}:{last.lineno}" + (
        f", from {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours and ours[-1] is not last else ""
    )
    return f"{type(error).__name__} ({where}): {' '.join(str(error).split())[:400]}"


@contextmanager
def _notices(found: Found) -> Iterator[None]:
    """What the user is told while a method is attached."""
    keep: Callable[[logging.LogRecord], bool] = lambda record: found.notices.append(record.getMessage()) is None  # noqa: E731
    log = logging.getLogger("spectune")
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
