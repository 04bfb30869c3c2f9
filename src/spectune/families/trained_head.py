"""The head that is trained together with a delta: what a model has outside of its base model, but for vocabulary heads,
which are the base's own."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from spectune.errors import ConfigError


@dataclass(frozen=True)
class HeadPart:
    """A module of a trained head. `shapes`: its parameters' names and shapes."""

    path: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def trained_head(model: PreTrainedModel, decoder: str) -> tuple[HeadPart, ...]:
    """The modules with weights that stand beside the child of `model` that holds `decoder`. Raises ConfigError: there
    are none, or one has both weights and modules of its own."""
    inside = decoder.split(".")[0]
    found = []
    for path, module in model.named_modules():
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
        if not shapes or path.split(".")[0] == inside:
            continue
        if not path or any(name != "deltas" for name, _ in module.named_children()):
            raise ConfigError(
                f"{type(model).__name__}: its head cannot be trained beside a delta: {path or 'the model itself'} has "
                "weights of its own around other modules"
            )
        found.append(HeadPart(path, shapes))
    if not found:
        raise ConfigError(f"{type(model).__name__}: no head with weights was found beside {inside!r}")
    return tuple(found)
