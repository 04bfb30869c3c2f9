"""A delta: one method's trained weights for one task, attached to a base under a name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spectune.deltas import sites
from spectune.deltas.method import AttentionSite, InputSite, Method, OutputSite, ParameterSite, Setting, Site
from spectune.deltas.modules import DeltaModule, OutputModule
from spectune.errors import ConfigError, DataError
from spectune.families import Family, fingerprint
from spectune.files.weights import FLOATS, check_finite, read_headers, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.deltas.registry import Registry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class Writer(Protocol):
    def __call__(self, delta: Delta, folder: str | Path) -> Path: ...


class Delta:
    """One method on one model under one name. Made by `attach` and `load_delta`.

    Its modules stand at their sites inside the model; this object lists them and knows what is stored.
    """

    #: Writes a delta's folder. The room `storage` puts itself here: it stands above this one and may not be imported.
    writer: ClassVar[Writer | None] = None

    def __init__(self, method: Method, model: PreTrainedModel, family: Family, name: str) -> None:
        self.method = method
        self.model = model
        self.family = family
        self.name = name
        self.base_fingerprint = fingerprint(model, family)
        self.shared: nn.Module | None = None
        self._modules: dict[str, tuple[Site, DeltaModule]] = {}
        #: output sites whose host's parameter is changed in place of its output, and which one
        self._on_parameters: dict[str, str] = {}

    # -- what it holds ----------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[tuple[Site, DeltaModule]]:
        """Each site and the module that acts there, in the model's order."""
        return list(self._modules.values())

    def module_at(self, path: str) -> DeltaModule | None:
        """The module at a path of the model, None where this delta does not act."""
        found = self._modules.get(path)
        return None if found is None else found[1]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights that training changes, float32, named `site path.parameter`."""
        if self.shared is not None:
            yield from ((f"shared.{name}", p) for name, p in self.shared.named_parameters())
        for path, (_, module) in self._modules.items():
            yield from ((f"{path}.{name}", p) for name, p in module.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights that training changes: what an optimizer takes."""
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        """Weights that are stored and used at inference."""
        return self.method.num_parameters(self.family)

    def num_trained_parameters(self) -> int:
        """Weights that are trained, those included that only training has."""
        return self.method.num_trained_parameters(self.family)

    def print_trainable_parameters(self) -> None:
        """Print trained weights, all weights and the share, as PEFT's method of this name does."""
        trained, total = self.num_trained_parameters(), self.total_parameters()
        share = 100 * trained / total
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    def total_parameters(self) -> int:
        """Weights of the base and this delta together, while training."""
        return self.family.num_parameters + self.num_trained_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that are stored, named `site path.parameter`; what only training has is folded in."""
        return {
            f"{path}.{name}": tensor
            for path, (_, module) in self._modules.items()
            for name, tensor in module.stored().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`.

        Raises:
            DataError: missing, surplus or misshapen tensors, all listed at once; nothing is written then.
        """
        check_tensors(self.state_dict(), state, f"delta {self.name!r}")
        for path, (_, module) in self._modules.items():
            module.load_stored({name: state[f"{path}.{name}"] for name in module.stored()})

    def training_state_dict(self) -> dict[str, Tensor]:
        """All trained tensors as they are, reparametrisation included: for checkpoints."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_training_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `training_state_dict`. Raises DataError as `load_state_dict` does."""
        own = self.training_state_dict()
        check_tensors(own, state, f"checkpoint of delta {self.name!r}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    # -- on disk ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the delta's folder, atomically: `adapter_config.json`, `adapter_model.safetensors`, `spectune.json`.

        A fully tuned model is written as a transformers folder. Returns the folder.
        """
        if Delta.writer is None:
            raise ConfigError("import spectune.storage (or use spectune.attach) before Delta.save")
        return Delta.writer(self, folder)

    def write_files(self, folder: Path) -> None:
        """Write config and weights into an existing folder, not atomically: `save` is for users."""
        config, tensors = self.method.to_folder(self.state_dict(), self.family)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def weight_files(self, folder: Path) -> list[Path]:
        """The safetensors files of a folder that hold this delta."""
        return [folder / WEIGHTS_FILE]

    def check_files(self, folder: Path) -> None:
        """Check by their headers alone that a folder's files hold this delta: before it is open, nothing allocated.

        Raises:
            DataError: a file is missing or damaged, or its tensors are not this delta's (all listed).
        """
        headers = read_headers(self.weight_files(folder))
        given = self.method.from_folder(headers, self.family)
        if len(given) < len(headers):
            raise DataError(f"{folder / WEIGHTS_FILE} holds a tensor twice, under two names: {', '.join(headers)}")
        check_tensors(self.tensors_needed(), given, str(folder / WEIGHTS_FILE))

    def tensors_needed(self) -> dict[str, Tensor]:
        """What `state_dict` gives once the delta is open, on the meta device: absurd sizes cost nothing."""
        with torch.device("meta"):
            built = [(site.path, self.method.build(site)) for site in self.method.sites(self.family)]
            return {f"{path}.{name}": tensor for path, module in built for name, tensor in module.stored().items()}

    def read_files(self, folder: Path) -> None:
        """Load what `write_files` wrote (or PEFT) into this delta, whose method is the stored one.

        Raises:
            DataError: the file is missing or damaged, its tensors are not this delta's, or some are not finite.
        """
        state = self.method.from_folder(read_weights(self.weight_files(folder)), self.family)
        check_finite(state, dict.fromkeys(state, torch.float32), str(folder / WEIGHTS_FILE))
        self.load_state_dict(state)

    # -- its life on the model, driven by attach and detach -----------------------------------------------------------

    def open(self, registry: Registry) -> None:
        """Build the modules and put them at their sites."""
        self.shared = self.method.build_shared(self.family)
        for site in self.method.sites(self.family):
            host = self.model.get_submodule(host_path(site))
            module = self.method.build(site)
            if self.shared is not None:
                module.use_shared(self.shared)
            module.placed_at(host)
            module.to(_device_of(host, self.model)).train(self.model.training)
            # each may raise, and close() undoes what stands in _modules: a site that was opened, and put where it was
            match site:
                case OutputSite():
                    registry.open_output(site.path)
                case AttentionSite():
                    registry.open_attention(site.path)
                case ParameterSite():
                    registry.open_parameter(site.owner, site.name)
                case InputSite():
                    pass  # the decoder's hooks are there from the first attach
            self._modules[site.path] = (site, module)
            sites.put(host, self.name, module, _part(site))
        if self.shared is not None:
            # a child of the decoder, so that `model.to` and `parameters()` see it
            decoder = self.model.get_submodule(self.family.decoder)
            self.shared.to(_device_of(decoder, self.model)).train(self.model.training)
            sites.put_shared(decoder, self.name, self.shared)

    def initialise(self, setting: Setting) -> None:
        """Write the first weights."""
        with torch.no_grad():
            self.method.initialise(self, setting)

    def close(self, registry: Registry) -> None:
        """Take the modules away."""
        for path, (site, _) in self._modules.items():
            sites.take(self.model.get_submodule(host_path(site)), self.name, _part(site))
            match site:
                case OutputSite() if path in self._on_parameters:
                    registry.close_parameter(path, self._on_parameters[path])
                case OutputSite():
                    registry.close_output(path)
                case AttentionSite():
                    registry.close_attention(path)
                case ParameterSite():
                    registry.close_parameter(site.owner, site.name)
                case InputSite():
                    pass
        if self.shared is not None:
            sites.take_shared(self.model.get_submodule(self.family.decoder), self.name)
        self._modules = {}
        self._on_parameters = {}

    def act_on_parameter(self, path: str, registry: Registry) -> bool:
        """Let the module at an output site change the host's parameter in place of its output. False if it cannot."""
        module, host = self._modules[path][1], self.model.get_submodule(path)
        name = module.acts_on if isinstance(module, OutputModule) else None
        parameter = None if name is None else getattr(host, name, None)
        if name is None or not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            return False
        if not registry.can_hold(path):
            return False
        registry.close_output(path)
        registry.open_parameter(path, name)
        self._on_parameters[path] = name
        return True

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The base as it was, for the duration. A delta beside the base has nothing to do: the route leaves it out."""
        yield

    def __repr__(self) -> str:
        return f"Delta({self.name!r}, {self.method!r}, {self.num_parameters():,} parameters)"


def host_path(site: Site) -> str:
    """The path of the module that a site's module is a child of."""
    return site.owner if isinstance(site, ParameterSite) else site.path


def _part(site: Site) -> str:
    return site.name if isinstance(site, ParameterSite) else ""


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise one DataError that lists every missing, surplus and misshapen tensor."""
    problems = [f"missing: {name} {list(t.shape)}" for name, t in expected.items() if name not in given]
    problems += [f"surplus: {name} {list(t.shape)}" for name, t in given.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {list(given[name].shape)}, expected {list(t.shape)}"
        for name, t in expected.items()
        if name in given and given[name].shape != t.shape
    ]
    problems += [
        f"wrong type: {name} is {given[name].dtype}, expected float32, bfloat16, float16 or float64"
        for name, t in expected.items()
        if name in given and given[name].dtype not in (*FLOATS, t.dtype)
    ]
    if problems:
        raise DataError(f"{what}: the tensors do not fit", problems)


def _device_of(module: nn.Module, model: Any) -> torch.device:
    tensor = next((t for t in module.parameters() if t.device.type != "meta"), None)
    return tensor.device if tensor is not None else torch.device(model.device)
