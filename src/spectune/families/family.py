"""The parts of a causal language model: decoder, layers, attention, feed-forward, linears, embeddings, head.

Everything is found by what a module *is* and where it is (a list as long as the config says, a module that knows
its layer's number and owns projections), so that a model type nobody here has heard of is described the same way.
"""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from spectune.errors import ConfigError
from spectune.families.biases import Bias, biases_of
from spectune.families.module_kinds import linear_shape
from spectune.families.parts import inner_activation
from spectune.families.quantised import is_plain, is_transposed, packed_away
from spectune.families.self_attention import Attention, attention_names, attention_of
from spectune.families.stack import beside_text, find_decoder, find_layers
from spectune.families.trained_head import HeadPart, trained_head
from spectune.objectives import CAUSAL_LM, Objective, objective_of


@dataclass(frozen=True)
class Linear:
    """A linear map inside a layer: `y[..., out_features] = W x[..., in_features] (+ b)`."""

    path: str
    in_features: int
    out_features: int
    #: adding a vector to the output equals adding a bias, and changes nothing at padding: not so where a convolution
    #: over positions follows, or the output is computed from the map (a router's scores)
    bias_equivalent: bool = True


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward sublayer. `whole` is False where its linears stand in the layer itself (OPT has no module of its
    own for it): its output is then the last linear's, and its input cannot be seen at the same place.

    `activation`: the module of its nonlinearity, which gives `inner_size` features; None where it has none of its own
    (experts share one, or it is a function)."""

    path: str
    hidden_size: int
    whole: bool = True
    activation: str | None = None
    inner_size: int = 0


@dataclass(frozen=True)
class Layer:
    """One decoder layer (a transformer block). Some have more than one attention, state-space layers have none."""

    path: str
    hidden_size: int
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None

    @property
    def attention(self) -> Attention | None:
        """The first one."""
        return self.attentions[0] if self.attentions else None


@dataclass(frozen=True)
class Family:
    """The parts of one model, as module paths (`model.get_submodule(path)`) and sizes."""

    model_type: str
    decoder: str
    embedding: str
    head: str | None
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    linears: tuple[Linear, ...]
    biases: tuple[Bias, ...]
    num_parameters: int
    #: every linear is a `Conv1D`, or stands for one: its weight is transposed (PEFT calls that fan_in_fan_out)
    conv1d: bool
    #: rows of a learned table of absolute positions, None where positions are rotary or relative
    position_table: int | None
    #: tokens that some layers' attention reaches back at most, None where all see everything
    sliding_window: int | None = None
    #: what the model is for, by PEFT's name; and the modules of a head that every delta has its own of: those of a
    #: vocabulary head are the base's
    task_type: str = CAUSAL_LM.task_type
    trained_head: tuple[HeadPart, ...] = ()

    def gathers_tokens(self, path: str) -> bool:
        """Whether the module at `path` is in a list inside its layer (experts): its input is tokens of any rows."""
        layer = next((layer.path for layer in self.layers if path.startswith(layer.path + ".")), None)
        return layer is not None and re.search(r"\.\d+(\.|$)", path[len(layer) :]) is not None

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(attention for layer in self.layers for attention in layer.attentions)


def describe(model: PreTrainedModel) -> Family:
    """The parts of `model`, which may be on the meta device. Raises ConfigError: the model has no list of decoder
    layers or no token embeddings that can be recognised; it is an encoder-decoder; or it has a head that is not trained
    here."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder: what it reads goes through another stack than what it "
            "writes, and spectune is for models that go on with a text. Load its decoder alone, as "
            "AutoModelForCausalLM does for types that have one, or a decoder-only model."
        )
    task_type = objective_of(model).task_type
    text = model.config.get_text_config()
    names = {id(module): name for name, module in model.named_modules()}
    beside = beside_text(model)
    decoder = find_decoder(model, names, beside)
    embedding = model.get_input_embeddings()
    if embedding is None or id(embedding) not in names or not hasattr(embedding, "weight"):
        raise ConfigError(
            f"{type(model).__name__}: no table of token embeddings was found (get_input_embeddings() gave "
            f"{type(embedding).__name__}); spectune needs a model of one stream of tokens"
        )
    head = model.get_output_embeddings() if task_type == CAUSAL_LM.task_type else None  # type: ignore[no-untyped-call]
    hidden = int(getattr(embedding, "embedding_dim", None) or text.hidden_size)
    stacks = find_layers(decoder, text, model, names, beside)
    layers = _describe_layers(model, stacks, hidden, text, beside)
    linears = tuple(
        Linear(f"{path}.{name}", *shape, _bias_equivalent(model, f"{path}.{name}"))
        for path in stacks
        for name, module in model.get_submodule(path).named_modules()
        if (shape := linear_shape(module)) is not None and f"{path}.{name}" not in beside
    )
    head_path = names.get(id(head))
    return Family(
        model_type=str(model.config.model_type), decoder=names[id(decoder)], embedding=names[id(embedding)],
        head=head_path, hidden_size=hidden, vocab_size=int(getattr(embedding, "num_embeddings", text.vocab_size)),
        layers=layers, linears=linears, biases=biases_of(model, names[id(decoder)], head_path, beside),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()) + packed_away(model),
        conv1d=bool(linears) and all(is_transposed(model.get_submodule(t.path)) for t in linears),
        position_table=_position_table(decoder, embedding, text), sliding_window=_sliding_window(text),
        task_type=task_type,
        trained_head=() if task_type == CAUSAL_LM.task_type else trained_head(model, names[id(decoder)]),
    )  # fmt: skip


def family_from_config(config: PretrainedConfig, objective: Objective = CAUSAL_LM) -> Family:
    """The parts of the model that `config` describes, with the objective's head. It is built on the meta device: no
    weight is made or read."""
    return describe(objective.empty_model(config))


def _describe_layers(
    model: PreTrainedModel, stacks: list[str], hidden: int, config: PretrainedConfig, beside: frozenset[str]
) -> tuple[Layer, ...]:
    modules = [
        (f"{path}.{name}", layer)
        for path in stacks
        for name, layer in model.get_submodule(path).named_children()
        if f"{path}.{name}" not in beside
    ]
    names = [attention_names(layer, path, beside) for path, layer in modules]
    if not any(names):
        names = [attention_names(layer, path, beside, by_class=True) for path, layer in modules]
    found = []
    for index, ((path, layer), attentions) in enumerate(zip(modules, names, strict=True)):
        described = tuple(
            attention_of(layer.get_submodule(name), f"{path}.{name}", index, hidden, config) for name in attentions
        )
        found.append(Layer(path, hidden, described, _feed_forward(layer, path, attentions, hidden, beside)))
    return tuple(found)


def _bias_equivalent(model: PreTrainedModel, path: str) -> bool:
    """See `Linear.bias_equivalent`: false for subclasses of `nn.Linear` with a forward of their own (quantised ones
    excepted), and beside a convolution for all linears but the last."""
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and is_plain(module.weight):
        return False
    owner, _, leaf = path.rpartition(".")
    children = dict(model.get_submodule(owner).named_children())
    linears = [name for name, child in children.items() if linear_shape(child) is not None]
    return leaf == linears[-1] or not any(isinstance(child, nn.Conv1d) for child in children.values())


def _feed_forward(
    layer: nn.Module, path: str, attentions: list[str], hidden: int, beside: frozenset[str]
) -> FeedForward | None:
    """Feed-forward is the heaviest other child of the layer; or the layer's own linears, in their order."""
    taken = {name.split(".")[0] for name in attentions}
    weights = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in layer.named_children()
        if name not in taken and f"{path}.{name}" not in beside
        and linear_shape(child) is None and any(p.dim() > 1 for p in child.parameters())
    }  # fmt: skip
    if weights:
        name = max(weights, key=lambda name: weights[name])
        activation, inner = inner_activation(layer.get_submodule(name))
        return FeedForward(f"{path}.{name}", hidden, True, activation and f"{path}.{name}.{activation}", inner)
    own = [name for name, child in layer.named_children() if linear_shape(child) is not None]
    if not own:
        return None
    activation, inner = inner_activation(layer)
    return FeedForward(f"{path}.{own[-1]}", hidden, False, activation and f"{path}.{activation}", inner)


def _position_table(decoder: nn.Module, embedding: nn.Module, config: PretrainedConfig) -> int | None:
    """Rows of a table of learned absolute positions: another embedding of the decoder's, as long as the context."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return None
    tables = [m.num_embeddings for m in decoder.children() if isinstance(m, nn.Embedding) and m is not embedding]
    # some tables have two rows more than the context (OPT), which the model's forward adds itself
    return int(context) if any(context <= rows <= context + 2 for rows in tables) else None


def _sliding_window(config: PretrainedConfig) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if isinstance(window, int) and (kinds is None or "sliding_attention" in kinds) else None
