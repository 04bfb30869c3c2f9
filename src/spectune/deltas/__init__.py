"""The core: the contract of methods and deltas, the four kinds of site, routing, attach and detach."""

from spectune.deltas.attach import attach, attached, detach
from spectune.deltas.delta import Delta
from spectune.deltas.embeddings import prove_reads_embeddings
from spectune.deltas.merge import merge
from spectune.deltas.method import AttentionSite, InputSite, Method, OutputSite, ParameterSite, Setting, Site
from spectune.deltas.modules import AttentionModule, DeltaModule, InputModule, OutputModule, ParameterModule
from spectune.deltas.packs import kernel_serves, packed, packing, why_not_packed
from spectune.deltas.padding import why_padding_is_told
from spectune.deltas.probe import cached_values, capture_keys_and_values
from spectune.deltas.proof import uncalled
from spectune.deltas.registry import Registry
from spectune.deltas.routing import route

__all__ = [
    "AttentionModule",
    "AttentionSite",
    "Delta",
    "DeltaModule",
    "InputModule",
    "InputSite",
    "Method",
    "OutputModule",
    "OutputSite",
    "ParameterModule",
    "ParameterSite",
    "Registry",
    "Setting",
    "Site",
    "attach",
    "attached",
    "cached_values",
    "capture_keys_and_values",
    "detach",
    "kernel_serves",
    "merge",
    "packed",
    "packing",
    "prove_reads_embeddings",
    "route",
    "uncalled",
    "why_not_packed",
    "why_padding_is_told",
]
