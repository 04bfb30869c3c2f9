"""Refusals, sorted: what the words of one come down to, and what it would take to do without it."""

from __future__ import annotations

import re
from typing import NamedTuple


class Reason(NamedTuple):
    """A kind of refusal: a pattern in its words, the reason in short, and what it would take."""

    pattern: str
    short: str
    takes: str


REASONS = (
    Reason(
        r"does not use transformers' attention interface|does not use the attention function",
        "The type's attention is code of its own, which transformers' attention interface does not reach: learned keys "
        "and values cannot be put before its own.",
        "A site inside that code for each type, or transformers writing it with the interface, as it did the others.",
    ),
    Reason(
        r"no attention was found",
        "There is no attention in the layers, only states; or it stands beside them, or its projections are no "
        "linears.",
        "Where there are only states nothing could: the method is about attention. LoRA, adapters and BitFit act on "
        "these types. For the others, a site inside their own code.",
    ),
    Reason(
        r"needs token ids|reads more from token ids",
        "The model reads token ids beside their embeddings (tables for each layer, hashed routing), and virtual tokens "
        "have no ids.",
        "Trained rows for virtual tokens in each of these tables.",
    ),
    Reason(
        r"carries its state in",
        "The decoder has no cache, and its state does not tell what went through it, virtual tokens among that.",
        "A state that says what is in it.",
    ),
    Reason(
        r"does not give tensors of \d+ features",
        "A block does not give one stream of hidden states (several streams side by side, reversible halves), so that "
        "an adapter of the embeddings' width does not fit after it.",
        "An adapter for each stream. Other placements, and LoRA, act inside of the block.",
    ),
    Reason(
        r"no gradient comes from the logits",
        "No gradient comes to anything in the layers: they are run off the graph (reversible layers compute their own "
        "backward pass, and only for inputs that need gradients).",
        "An input that needs gradients, and hooks that take part in the type's own backward pass.",
    ),
    Reason(
        r"no list of decoder layers",
        "There is no one list of decoder layers around the token embeddings: the text goes through several stacks with "
        "configs of their own (bytes, patches).",
        "A description of the type's stacks one after the other.",
    ),
    Reason(
        r"no table of token embeddings",
        "There is no one table of token embeddings: each step is several tokens at once (audio code books).",
        "A loss and batches for several streams of tokens.",
    ),
    Reason(
        r"Prefix tuning is refused: .* own code does not take it",
        "Attention adds a position bias that is as wide as the text: it has no entries for keys in front.",
        "Bias entries for the prefix, put in by the type's own code.",
    ),
    Reason(
        r"Prompt tuning is refused: .* own code does not take it|do not go with prompt tuning",
        "The decoder takes something beside the embeddings that is as long as the text (streams that it predicts from, "
        "inputs for each layer, cut chunks), and has none for virtual tokens.",
        "Entries for virtual tokens in that input.",
    ),
    Reason(
        r"attention uses keys",
        "Among the keys that attention uses are some that are not of single tokens (compressed ones), so that the keys "
        "of common words, which a prefix starts from, cannot be read off.",
        "A start from noise, and a proof that the compressed entries do not move with the prefix.",
    ),
    Reason(
        r"cannot be told",
        "Which outputs make keys and values is not told by names and shapes (layers without attention, latent "
        "attention, several projections).",
        "Sites for the scaled vectors of each such layer; they are defined for keys, values and feed-forward only.",
    ),
    Reason(
        r"the values of layer \d+ are not the outputs",
        "What attention uses as values is no slice of a projection's outputs (fused head by head, normalised, gated).",
        "A permuted slice, found by running the model, where it is a permutation.",
    ),
    Reason(
        r"is never called in a forward pass",
        "Some linears of this base are used by their weights alone, without a call, and have no bias to change.",
        "A site for outputs of a function call.",
    ),
    Reason(
        r"stands outside of the decoder",
        "The head adds its bias in code of its own, outside of any module whose output could be changed.",
        "A hook around the head.",
    ),
    Reason(
        r"matches no trainable norm",
        "The base's norms have no weights.",
        "Nothing could: the method is about them.",
    ),
)


def sort(words: str) -> Reason | None:
    """The kind of a refusal with these words; None where it is of no known kind."""
    return next((reason for reason in REASONS if re.search(reason.pattern, words, re.DOTALL)), None)
