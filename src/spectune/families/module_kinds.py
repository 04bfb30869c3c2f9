"""Questions about one module: is it a linear map, does it hold a bias that is added to its output?"""

from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of a linear map, or None for any other module.

    `nn.Linear` and its quantised stand-ins carry both numbers as attributes; GPT-2's `Conv1D` is the same map with
    its weight transposed, `[in, out]`."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    if not isinstance(in_features, int) or not isinstance(out_features, int) or weight is None:
        return None
    if isinstance(weight, nn.Parameter) and weight.dim() > 2:  # one map for each expert
        return None
    return in_features, out_features


def token_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The table of token embeddings, `weight` `[vocabulary, hidden]`."""
    return cast(nn.Embedding, model.get_input_embeddings())


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """What the model says its token embeddings are, None where it does not say."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def embedding_width(model: PreTrainedModel) -> int:
    """Columns of that table: the base's hidden size, but in the few types that project embeddings."""
    return int(token_embedding(model).weight.shape[1])


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the table of token embeddings: ids that the model takes are below this number, whatever its tokenizer
    has."""
    return int(token_embedding(model).weight.shape[0])


def is_norm(module: nn.Module) -> bool:
    """A normalisation: a leaf whose weight is a vector (its bias, if any, is added last)."""
    weight = getattr(module, "weight", None)
    leaf = all(name == "deltas" for name, _ in module.named_children())  # a delta attached to it is no part of it
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and leaf
