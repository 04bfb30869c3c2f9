"""Full fine-tuning's delta: the base itself, all of whose weights are trained."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas.delta import Delta
from spectune.deltas.folder import DeltaFiles, check_tensors
from spectune.deltas.site import Site
from spectune.errors import ConfigError, DataError, first_line, is_out_of_memory, some
from spectune.families import quantised_weights
from spectune.files.digests import Digest
from spectune.files.weights import check_finite, need_weights, read_headers, read_weights


@dataclass(eq=False, repr=False)
class TunedBase(Delta):
    """The base, trained in place. Nothing stands beside it, and taking it off needs a copy of the base. `keep_base`:
    keep the base's weights in host memory. Raises ConfigError: the base is quantised, so that its weights take no
    gradient."""

    keep_base: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        if quantised := quantised_weights(self.model):
            path, kind = next(iter(quantised.items()))
            raise ConfigError(
                f"{self.method.label} trains the base's own weights, and {len(quantised)} of them are quantised "
                f"({path}: {kind}), which take no gradient. Load the base without base_precision, or use a method that "
                "leaves the base as it is, such as LoRA."
            )
        self._began_with = self.identity.fingerprint  # training writes over what it is of
        # tied ones by each of their names: they may be untied by the time that they are put back
        self._held = dict(self.model.named_parameters(remove_duplicate=False)) if self.keep_base else {}
        copies = {parameter: parameter.detach().cpu().clone() for parameter in self._held.values()}
        self._kept = {name: copies[parameter] for name, parameter in self._held.items()}

    def total_parameters(self) -> int:
        return self.family.num_parameters

    def fingerprint_to_store(self) -> dict[str, Any]:
        """Of the base that training began with."""
        return self._began_with

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()

    @property
    def files(self) -> DeltaFiles:
        return ModelFiles(self.model)

    def put_on(self, sites: Sequence[Site], opened: Callable[[Site], None]) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    def take_off(self, closed: Callable[[Site], None], *, undo: bool = False) -> None:
        if self.keep_base or not undo:  # an attach that failed has trained nothing
            _write(self.model, self._base("to be able to detach, attach with keep_base=True (or load the base again)"))
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        base = self._base("attach with keep_base=True to be able to go back to the bare base")
        tuned = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        _write(self.model, base)
        try:
            yield
        finally:
            _write(self.model, tuned)

    def _base(self, cure: str) -> Mapping[str, Tensor]:
        if not self.keep_base:
            raise ConfigError(f"the base was trained in place and no copy was kept; {cure}")
        now = dict(self.model.named_parameters(remove_duplicate=False))
        moved = {parameter: name for name, parameter in now.items()}
        names = {name: name if name in now else moved.get(held) for name, held in self._held.items()}
        kept = {here: self._kept[name] for name, here in names.items() if here is not None}
        if other := [name for name, weight in kept.items() if now[name].shape != weight.shape]:
            first = f"{other[0]}: {list(kept[other[0]].shape)} then, {list(now[other[0]].shape)} now"
            raise ConfigError(
                f"the base cannot be put back: {some(other)} changed shape since it was attached ({first}). Give them "
                "their shape back first (embeddings: model.resize_token_embeddings)."
            )
        return kept


class ModelFiles(DeltaFiles):
    """A transformers folder of the whole model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self._own = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def write(self, folder: Path) -> Mapping[str, Digest]:
        # the class's own method: the instance's is shadowed while deltas are attached
        type(self.model).save_pretrained(self.model, folder)
        return {}

    def weight_files(self, folder: Path) -> list[Path]:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            need_weights(folder / "model.safetensors")  # says what is there instead
        return files

    def check(self, folder: Path) -> None:
        headers = self._without_buffers(read_headers(self.weight_files(folder)))
        buffers, stored, held = (sum(t.numel() for t in ts.values()) for ts in (self._buffers(), headers, self._own))
        # buffers may have other names in another layout
        if not self._in_another_layout(headers) or not held <= stored <= held + buffers:
            check_tensors(self._own, headers, f"the model in {folder}")

    def read(self, folder: Path) -> None:
        what = f"the model in {folder}"
        state: Mapping[str, Tensor] = self._without_buffers(read_weights(self.weight_files(folder)))
        if self._in_another_layout(state):
            state = self._read_as_stored(folder, state)
        check_tensors(self._own, state, what)
        check_finite(state, {name: self._own[name].dtype for name in state}, what)
        _write(self.model, state)

    def _in_another_layout(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a folder names its tensors otherwise than the model does, rather than lacking some."""
        return len(set(state) & set(self._own)) < len(self._own) and not set(state) <= set(self._own)

    def _buffers(self) -> dict[str, Tensor]:
        """What a transformers folder holds beside the weights; nothing trains it, so that the base has the same."""
        named = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in named}

    def _without_buffers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = self._buffers()
        return {name: tensor for name, tensor in state.items() if name not in buffers}

    def _read_as_stored(self, folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self._converted(state)
        except DataError as error:
            raise DataError(f"the model in {folder}: {error}") from error
        except Exception as error:  # what transformers says of tensors that it cannot join
            if is_out_of_memory(error):
                raise
            raise DataError(f"the model in {folder}: the tensors do not fit ({first_line(error)})") from error

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The folder's weights under the model's names, by transformers itself: it stores some types otherwise than it
        holds them (each expert by itself, a head under its old name). Of the folder it is given these tensors, and
        nothing that could say what else to load."""
        load: Any = type(self.model).from_pretrained
        config = copy.deepcopy(self.model.config)
        model, found = load(
            None, config=config, state_dict=dict(state), dtype=self.model.dtype, output_loading_info=True
        )
        problems = [f"{kind.replace('_', ' ')}: {entry}" for kind, entries in found.items() for entry in entries]
        if problems:
            raise DataError("the tensors do not fit", problems)
        return {name: parameter.detach().to(self.model.device) for name, parameter in model.named_parameters()}


def _write(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Weights into the model; those that it did not have when `state` was taken stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in state:
                parameter.copy_(state[name])
