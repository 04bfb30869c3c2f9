"""Full fine-tuning: train every weight of the base.

The yardstick of the spectrum. The base itself is the delta, so nothing can stand beside it, and taking it off needs
the copy that `attach(..., keep_base=True)` keeps in host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn

from spectune.deltas import Delta, Method, Registry, Setting, Site
from spectune.deltas.delta import check_tensors
from spectune.errors import ConfigError, DataError
from spectune.families import Family, quantised_weights
from spectune.files.weights import check_finite, need_weights, read_headers, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.deltas import DeltaModule


class FullFineTuning(Method):
    """Train all weights of the base, in place."""

    name: Literal["full"] = "full"

    label: ClassVar[str] = "Full"
    best_for: ClassVar[str] = "the most data and compute, one task, quality above all"
    default_learning_rate: ClassVar[float] = 3e-4
    default_learning_rate_source: ClassVar[str] = "Li and Liang's code for GPT-2 has 5e-5; small bases take more"
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 5e-3)
    learning_rate_range_source: ClassVar[str] = (
        "1e-5 is PEFT's method comparison on a 3B base; 2e-3 was best for a 27M one on E2E"
    )
    trains_base: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def sites(self, family: Family) -> list[Site]:
        return []

    def build(self, site: Site) -> NoReturn:
        raise AssertionError("full fine-tuning has no sites")

    def num_parameters(self, family: Family) -> int:
        return family.num_parameters

    def initialise(self, delta: Delta, setting: Setting) -> None:
        """The base's weights are the first weights."""

    def bind(self, model: PreTrainedModel, family: Family, name: str, *, keep_base: bool) -> Delta:
        quantised = quantised_weights(model)
        if quantised:
            path, kind = next(iter(quantised.items()))
            raise ConfigError(
                f"{self.label} trains the base's own weights, and {len(quantised)} of them are quantised ({path}: "
                f"{kind}), which take no gradient. Load the base without base_precision, or use a method that leaves "
                "the base as it is, such as LoRA."
            )
        return TunedBase(self, model, family, name, keep_base)


class TunedBase(Delta):
    """The base, all of whose weights are trained."""

    def __init__(self, method: Method, model: PreTrainedModel, family: Family, name: str, keep_base: bool) -> None:
        super().__init__(method, model, family, name)
        #: the base's weights before training, on the host
        self._kept = {n: p.detach().cpu().clone() for n, p in model.named_parameters()} if keep_base else None

    def open(self, registry: Registry) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    def close(self, registry: Registry) -> None:
        if self._kept is None:
            raise ConfigError(
                "the base was trained in place and no copy was kept; to be able to detach, attach with keep_base=True "
                "(or load the base again)"
            )
        self._write(self._kept)
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        if self._kept is None:
            raise ConfigError("the bare base is gone: attach with keep_base=True to be able to go back to it")
        tuned = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._write(self._kept)
        try:
            yield
        finally:
            self._write(tuned)

    def _write(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()

    def total_parameters(self) -> int:
        return self.family.num_parameters

    def state_dict(self) -> dict[str, Tensor]:
        return self.training_state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.load_training_state_dict(state)

    def module_at(self, path: str) -> DeltaModule | None:
        return None

    def write_files(self, folder: Path) -> None:
        # the class's own method: the instance's is shadowed while deltas are attached
        type(self.model).save_pretrained(self.model, folder)

    def weight_files(self, folder: Path) -> list[Path]:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            need_weights(folder / "model.safetensors")  # says what is there instead
        return files

    def check_files(self, folder: Path) -> None:
        own = self.training_state_dict()
        headers = self._without_buffers(read_headers(self.weight_files(folder)))
        if _in_another_layout(headers, own):
            _check_same_size(headers, own, sum(buffer.numel() for buffer in self._buffers().values()), folder)
        else:
            check_tensors(own, headers, f"the model in {folder}")

    def read_files(self, folder: Path) -> None:
        """Load a transformers folder's weights into the base."""
        own, what = self.training_state_dict(), f"the model in {folder}"
        state: Mapping[str, Tensor] = self._without_buffers(read_weights(self.weight_files(folder)))
        if _in_another_layout(state, own):
            state = self._converted(folder)
        check_tensors(own, state, what)
        check_finite(state, {name: own[name].dtype for name in state}, what)
        self._write(state)

    def _buffers(self) -> dict[str, Tensor]:
        """What a transformers folder holds beside the weights; nothing trains it, so that the base has the same."""
        own = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in own}

    def _without_buffers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = self._buffers()
        return {name: tensor for name, tensor in state.items() if name not in buffers}

    def _converted(self, folder: Path) -> dict[str, Tensor]:
        """By transformers itself: it stores some types otherwise than it holds them (each expert by itself, a head
        under its old name). Its own class, so that nothing but tensors is read."""
        load: Any = type(self.model).from_pretrained
        model, found = load(folder, dtype=self.model.dtype, output_loading_info=True, use_safetensors=True)
        problems = [f"{kind.replace('_', ' ')}: {entry}" for kind, entries in found.items() for entry in entries]
        if problems:
            raise DataError(f"the model in {folder}: the tensors do not fit", problems)
        return {name: parameter.detach().to(self.model.device) for name, parameter in model.named_parameters()}


def _in_another_layout(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether a folder names its tensors otherwise than the model does, rather than lacking some."""
    return len(set(state) & set(own)) < len(own) and not set(state) <= set(own)


def _check_same_size(headers: Mapping[str, Tensor], own: Mapping[str, Tensor], buffers: int, folder: Path) -> None:
    """`buffers`: numbers in the model's buffers, which another layout may hold under other names."""
    stored, held = (sum(t.numel() for t in tensors.values()) for tensors in (headers, own))
    if not held <= stored <= held + buffers:
        check_tensors(own, headers, f"the model in {folder}")
