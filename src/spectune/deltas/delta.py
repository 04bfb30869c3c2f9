"""A delta: one method's trained weights for one task, attached to a base under a name."""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas import slots
from spectune.deltas.absent_weights import execution_device
from spectune.deltas.folder import CONFIG_FILE, WEIGHTS_FILE, DeltaFiles, base_name, check_tensors, save_folder
from spectune.deltas.head_layout import check_head, parted, with_head, without_head
from spectune.deltas.method import Method, module_at
from spectune.deltas.modules import DeltaModule
from spectune.deltas.site import ParameterSite, Site
from spectune.deltas.trained_copy import HeadSite
from spectune.errors import DataError
from spectune.families import BaseIdentity, Family
from spectune.files.digests import Digest
from spectune.files.metadata import read_json
from spectune.files.tensor_file import write_tensors
from spectune.files.weights import check_finite, read_headers, read_weights

SHARED = "shared"


@dataclass(eq=False, repr=False)
class _Counts:
    """What a delta is of, and how many weights it has."""

    method: Method
    model: PreTrainedModel
    family: Family
    name: str
    identity: BaseIdentity

    def num_parameters(self) -> int:
        """Weights that are stored and used at inference."""
        return self.method.num_parameters(self.family)

    def num_trained_parameters(self) -> int:
        """Weights that are trained, those included that only training has."""
        return self.method.num_trained_parameters(self.family)

    def total_parameters(self) -> int:
        """Weights of the base and this delta together, while training."""
        return self.family.num_parameters + self.num_trained_parameters()

    def print_trainable_parameters(self) -> None:
        """Print trained weights, all weights and the share, as PEFT's method of this name does."""
        trained, total = self.num_trained_parameters(), self.total_parameters()
        share = 100 * trained / total
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    def __repr__(self) -> str:
        return f"Delta({self.name!r}, {self.method!r}, {self.num_parameters():,} parameters)"


class Delta(_Counts, ABC):
    """One method on one model under one name. Made by `attach` and `load_delta`.

    Attributes:
        method: the frozen config.
        model: the base that it is attached to.
        name: what `route` and `detach` call it.
        identity: which base that is.
    """

    @property
    def base_fingerprint(self) -> dict[str, Any]:
        """Of the base, as it was when somebody first asked; see `spectune.families.fingerprint`."""
        return self.identity.fingerprint

    def fingerprint_to_store(self) -> dict[str, Any]:
        """Of the base that the delta belongs to, taken now. Where the base has changed since the delta was attached,
        the log says so."""
        return self.identity.now(self.name)

    @property
    def sites(self) -> list[tuple[Site, DeltaModule]]:
        """Each site and the module that acts there, in the model's order."""
        return []

    @property
    def hosts(self) -> dict[str, nn.Module]:
        """The base's modules at which it acts, by their paths when it was attached."""
        return {}

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights that training changes, float32, named `site path.parameter`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights that training changes: what an optimizer takes."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that are stored, named `site path.parameter`; what only training has is folded in."""
        return self.training_state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises DataError: missing, surplus or misshapen tensors, all listed at once;
        nothing is written then."""
        self.load_training_state_dict(state)

    def training_state_dict(self) -> dict[str, Tensor]:
        """All trained tensors as they are, reparametrisation included: for checkpoints."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_training_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `training_state_dict`. Raises DataError as `load_state_dict` does."""
        own = self.training_state_dict()
        check_tensors(own, state, f"checkpoint of delta {self.name!r}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @property
    @abstractmethod
    def files(self) -> DeltaFiles:
        """How its weights are written to a folder and read from it."""

    def save(self, folder: str | Path) -> Path:
        """Write the delta's folder, atomically: `adapter_config.json`, `adapter_model.safetensors`, `spectune.json`.

        A fully tuned model is written as a transformers folder. A folder that an earlier save wrote is replaced.
        Returns the folder.

        Raises:
            ConfigError: the folder holds other files, which would be lost.
            WriteError: the disk is full, read-only or broken; the folder is as it was.
        """
        return save_folder(
            Path(folder), self.method, self.files.write,
            base=self.fingerprint_to_store(), base_name=base_name(self.model), parameters=self.num_parameters(),
        )  # fmt: skip

    # -- its life on the model, driven by the attachment ------------------------------------------------------------

    @abstractmethod
    def put_on(self, sites: Sequence[Site], opened: Callable[[Site], None]) -> None:
        """Build the modules and put them at their sites. `opened` opens a site, and may raise: what stands on the
        model then is taken off by `take_off`."""

    @abstractmethod
    def take_off(self, closed: Callable[[Site], None], *, undo: bool = False) -> None:
        """Leave the base as it was; `closed` closes a site. `undo`: of an attach that failed."""

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The base as it was, for the duration. A delta beside the base has nothing to do: the route leaves it out."""
        yield


@dataclass(eq=False, repr=False)
class ModuleDelta(Delta):
    """A delta of modules beside the base. They stand at their sites inside the model; this object lists them."""

    shared: nn.Module | None = None
    _modules: dict[str, tuple[Site, DeltaModule]] = field(default_factory=dict)
    # kept, since something else may stand at their paths by the time that the delta is taken off
    _hosts: dict[str, nn.Module] = field(default_factory=dict)
    # while it is off the model, and may come back: its modules, each with its site and its host
    _aside: dict[str, tuple[Site, DeltaModule, nn.Module]] = field(default_factory=dict)

    @property
    def hosts(self) -> dict[str, nn.Module]:
        return self._hosts

    @property
    def sites(self) -> list[tuple[Site, DeltaModule]]:
        return list(self._modules.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.shared is not None:
            yield from ((f"shared.{name}", p) for name, p in self.shared.named_parameters())
        for path, (_, module) in self._modules.items():
            yield from ((f"{path}.{name}", p) for name, p in module.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": tensor
            for path, (_, module) in self._modules.items()
            for name, tensor in module.stored().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_tensors(self.state_dict(), state, f"delta {self.name!r}")
        for path, (_, module) in self._modules.items():
            module.load_stored({name: state[f"{path}.{name}"] for name in module.stored()})

    @property
    def files(self) -> DeltaFiles:
        return AdapterFiles(self)

    def put_on(self, sites: Sequence[Site], opened: Callable[[Site], None]) -> None:
        self.shared = self.method.build_shared(self.family)
        for site in sites:
            host = self.model.get_submodule(site.host)
            module = self._aside[site.path][1] if self._aside else self._built(site, host)
            module.to(_device_of(host, self.model)).train(self.model.training)
            opened(site)
            self._modules[site.path], self._hosts[site.host] = (site, module), host
            slots.put(host, self.name, module, _part(site))
        if self.shared is not None:
            # a child of the decoder, so that `model.to` and `parameters()` see it
            decoder = self.model.get_submodule(self.family.decoder)
            self.shared.to(_device_of(decoder, self.model)).train(self.model.training)
            self._hosts[self.family.decoder] = decoder
            slots.put(decoder, self.name, self.shared, SHARED)
        self._aside = {}

    def _built(self, site: Site, host: nn.Module) -> DeltaModule:
        module = module_at(self.method, site)
        if self.shared is not None and not isinstance(site, HeadSite):
            module.bind_shared(self.shared)
        module.on_attach(host)
        return module

    def set_aside(self) -> None:
        """Keep what `take_off` takes off, so that `put_on` puts the same modules on again. Only of a stored method's,
        whose modules share nothing."""
        assert self.shared is None, "a stored delta has no weights of training alone"
        self._aside = {path: (site, module, self._hosts[site.host]) for path, (site, module) in self._modules.items()}

    def sites_aside(self) -> list[Site] | None:
        """Where its modules were; none where it was not set aside, and None where something else stands at one of these
        places now."""
        try:
            same = all(self.model.get_submodule(site.host) is host for site, _, host in self._aside.values())
        except AttributeError:
            same = False
        return [site for site, _, _ in self._aside.values()] if same else None

    def to_host(self) -> None:
        """Move what was set aside to host memory."""
        for _, module, _ in self._aside.values():
            module.to("cpu")

    def take_off(self, closed: Callable[[Site], None], *, undo: bool = False) -> None:
        for site, _ in self._modules.values():
            slots.take(self._hosts[site.host], self.name, _part(site))
            closed(site)
        if self.shared is not None and self.family.decoder in self._hosts:
            slots.take(self._hosts[self.family.decoder], self.name, SHARED)
        self._modules, self._hosts = {}, {}


class AdapterFiles(DeltaFiles):
    """A config and one safetensors file, in PEFT's layout where PEFT has the method. Another program's are read with
    the name of its file, and what makes that layout of its tensors."""

    def __init__(
        self, delta: ModuleDelta, weights: str = WEIGHTS_FILE,
        translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:  # fmt: skip
        self.delta, self.method, self.family = delta, delta.method, delta.family
        self.weights, self.translate = weights, translate

    def write(self, folder: Path) -> Mapping[str, Digest]:
        own, head = parted(self.delta.state_dict(), self.family)
        config, tensors = with_head(*self.method.to_folder(own, self.family), head, self.family)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return {WEIGHTS_FILE: write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})}

    def weight_files(self, folder: Path) -> list[Path]:
        return [folder / self.weights]

    def check(self, folder: Path) -> None:
        headers, where = self.translate(read_headers(self.weight_files(folder))), folder / self.weights
        check_head(headers, _task_type(folder), self.family, str(where))
        given = self._state(headers)
        if len(given) < len(headers):
            raise DataError(f"{where} holds a tensor twice, under two names: {', '.join(headers)}")
        check_tensors(self.method.stored_shapes(self.family), given, str(where))

    def read(self, folder: Path) -> None:
        self.delta.load_state_dict(self.weights_of(folder))

    def weights_of(self, folder: Path) -> dict[str, Tensor]:
        """The stored state, as `read` loads it. Raises DataError as `read`."""
        where, tensors = folder / self.weights, read_weights(self.weight_files(folder))
        try:
            state = self._state(self.translate(tensors))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        check_finite(state, dict.fromkeys(state, torch.float32), str(where))
        return state

    def _state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own, head = without_head(tensors, self.family)
        return self.method.from_folder(own, self.family) | head


def _task_type(folder: Path) -> str | None:
    """What a folder's delta was trained for, as its config says; None where it does not say."""
    try:
        found = (read_json(folder / CONFIG_FILE, any_integer=True) or {}).get("task_type")
    except DataError:  # who reads the config itself says what is wrong with it
        return None
    return found if isinstance(found, str) else None


def _part(site: Site) -> str:
    return site.name if isinstance(site, ParameterSite) else ""


def _device_of(module: nn.Module, model: Any) -> torch.device:
    tensor = next((t for t in module.parameters() if t.device.type != "meta"), None)
    loaded_on = execution_device(module)
    if loaded_on is not None:
        return loaded_on
    return tensor.device if tensor is not None else torch.device(model.device)
