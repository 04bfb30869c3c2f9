"""Floating-point operations of a training step, from shapes."""

import math

from spectune.deltas import InputSite, Method
from spectune.families import Family


def flops_per_token(family: Family, method: Method, length: int, *, checkpointing: bool = False) -> int:
    """Operations for each token of a row of `length` tokens, forward and backward, the head at every token.

    A product with a matrix of N weights takes 2 N a token in forward and as much for the gradient of its input; the
    gradient of a base's weights, where it is trained, as much again; a delta's own weights 6 P; causal attention 2 T q
    a layer in forward and twice that in backward; recomputation at most forward of the layers once more. Left out are
    norms, activations and rotary positions, and that backward ends at the lowest weight that is trained. Virtual tokens
    that run through the layers (prompt) are counted to the text's.
    """
    blocks = sum(linear.in_features * linear.out_features for linear in family.linears)
    trained = sum(math.prod(shape) for part in family.trained_head for _, shape in part.shapes)
    head = trained or family.vocab_size * family.hidden_size
    seen = length + method.virtual_tokens
    # queries are as wide as the attention's output, which is taken for the hidden size
    attention = 2 * seen * sum(attention.hidden_size for attention in family.attentions)
    times = 6 if method.trains_base else 4
    delta = 0 if method.trains_base else 6 * method.num_trained_parameters(family)
    again = 2 * blocks + attention if checkpointing else 0
    layers = times * blocks + 3 * attention + delta + again
    return times * head + (layers * seen // length if virtual_in_sequence(method, family) else layers)


def virtual_in_sequence(method: Method, family: Family) -> int:
    """Virtual tokens that take a place in the sequence itself; a prefix takes none."""
    return method.virtual_tokens if any(isinstance(site, InputSite) for site in method.sites(family)) else 0
