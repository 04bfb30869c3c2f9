"""The modules that text passes through: the decoder and its layers; and those of other modalities beside them."""

import re

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from spectune.errors import ConfigError
from spectune.families.module_kinds import input_embeddings

#: words in the names of modules that pictures and sound go through, beside the text
_OTHER_SENSES = re.compile(r"vision|visual|image|pixel|audio|speech|video|multi_?modal")
#: a module of this name gives numbers of tokens that attention is to look at, and nothing that a gradient comes through
_CHOOSES_TOKENS = re.compile(r"^indexer$")
#: words in the names of what a layer has for another model's states (cross-attention), or in their classes
_FOR_OTHER_STATES = re.compile(r"cross_?att|encoder_att|crossattention", re.IGNORECASE)


def beside_text(model: PreTrainedModel) -> frozenset[str]:
    """Paths of modules that text alone does not go through, with all that is in them: models inside the model that
    have a config of another kind than the text's (vision towers), modules named after another sense, and
    cross-attention to another model's states; and what chooses tokens by number, where no gradient comes. Taken from
    names and types; what is built on it is proved by running."""
    kinds = {type(model.config), type(model.config.get_text_config())}
    found: set[str] = set()
    for path, module in model.named_modules():
        if path.rpartition(".")[0] in found:
            found.add(path)
            continue
        leaf, kind = path.rpartition(".")[2], type(module).__name__
        another = isinstance(module, PreTrainedModel) and type(module.config) not in kinds
        named = _OTHER_SENSES.search(leaf) or _CHOOSES_TOKENS.search(leaf)
        if another or named or _FOR_OTHER_STATES.search(leaf) or _FOR_OTHER_STATES.search(kind):
            found.add(path)
    return frozenset(found)


def find_decoder(model: PreTrainedModel, names: dict[int, str], beside: frozenset[str]) -> nn.Module:
    """The module that makes hidden states of tokens: the model's own `get_decoder()`, or, where that is not one (the
    model itself, its head), the innermost module around both the token embeddings and the layers."""
    named: nn.Module | None = model.get_decoder()  # type: ignore[no-untyped-call]
    if named is not None and named is not model and id(named) in names and layer_lists(named, beside, names):
        return named
    embedding = names.get(id(input_embeddings(model)), "")
    lists = layer_lists(model, beside, names)
    if not lists or not embedding:
        raise no_layers(model, None)
    path = max(lists, key=lambda path: weights(model.get_submodule(path)))
    while path:
        path = path.rpartition(".")[0]
        if path and embedding.startswith(path + "."):
            return model.get_submodule(path)
    raise no_layers(model, None)


def find_layers(
    decoder: nn.Module, config: PretrainedConfig, model: PreTrainedModel, names: dict[int, str], beside: frozenset[str]
) -> list[str]:
    """The paths of the lists of decoder layers. Of those as long as the config says, the one with most weights. Where
    none is (a layer may hold two attentions, or be run more than once), the one with most weights of all, and every
    other list of the same kind of layers. Raises ConfigError: there is no list of modules with weights."""
    lists = layer_lists(decoder, beside, names)
    depth = getattr(config, "num_hidden_layers", None)
    if not lists:
        raise no_layers(model, depth)
    fitting = {path: stack for path, stack in lists.items() if len(stack) == depth}
    if fitting:
        return [max(fitting, key=lambda path: weights(fitting[path]))]
    kind = type(lists[max(lists, key=lambda path: weights(lists[path]))][0])
    return [path for path, stack in lists.items() if type(stack[0]) is kind]


def layer_lists(root: nn.Module, beside: frozenset[str], names: dict[int, str]) -> dict[str, nn.ModuleList]:
    """Every list of modules that text goes through and that has weights, by its path in the model; lists that stand in
    another one (experts in a layer) left out."""
    found: dict[str, nn.ModuleList] = {}
    for module in root.modules():
        path = names.get(id(module))
        if not isinstance(module, nn.ModuleList) or path is None or path in beside or not len(module):
            continue
        if not any(path.startswith(outer + ".") for outer in found) and weights(module):
            found[path] = module
    return found


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def no_layers(model: PreTrainedModel, depth: object) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__}: no list of decoder layers was found around its token embeddings"
        + (f" (num_hidden_layers = {depth})" if depth is not None else "")
        + "; spectune needs a decoder whose layers stand in one torch.nn.ModuleList"
    )
