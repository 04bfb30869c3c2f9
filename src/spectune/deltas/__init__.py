"""The core: the contract of methods and deltas, the four kinds of site, routing, attach and detach.

Each file imports only files that stand above it here:

    site, modules, layout   plain values, and the modules that act at sites
    rate_rule               a method's learning rate by the base's size
    slots                   where these modules stand in the model
    trained_copy            the module that stands for one of the base's own, with weights of its own
    forward_state           what is in force in a forward pass
    method                  the contract of a method
    hooks/                  what acts inside a forward pass
    folder, delta           one delta, and its files
    open_sites, attachment  the deltas of one model
    packed_batches          several documents in one sequence
    probes/                 what is proved by running the base
    tuned_base              full fine-tuning's delta
    attaching, routing, merging  the verbs
"""

from spectune.deltas.attaching import attach, attached, detach, place, unplaced
from spectune.deltas.attachment import Attachment, BaseFacts
from spectune.deltas.delta import Delta
from spectune.deltas.folder import base_name
from spectune.deltas.merging import merge, merge_and_measure
from spectune.deltas.method import InitContext, Method
from spectune.deltas.modules import AttentionModule, DeltaModule, InputModule, OutputModule, ParameterModule
from spectune.deltas.packed_batches import packed, packing
from spectune.deltas.probes.attention_calls import why_not_cudnn
from spectune.deltas.probes.base_runs import cached_values, capture_keys_and_values
from spectune.deltas.probes.documents import kernel_serves, why_not_packed
from spectune.deltas.probes.embeddings import prove_reads_embeddings
from spectune.deltas.probes.right_padding import why_mask_is_needed
from spectune.deltas.probes.survey import uncalled
from spectune.deltas.rate_rule import SWEEPS, TINKER, BaseRate, RatePoint, RateRule
from spectune.deltas.routing import route
from spectune.deltas.site import AttentionSite, InputSite, OutputSite, ParameterSite, Site
from spectune.deltas.trained_copy import CopySite, TrainedCopy

__all__ = [
    "SWEEPS", "TINKER", "Attachment", "AttentionModule", "AttentionSite", "BaseFacts", "BaseRate", "CopySite", "Delta",
    "DeltaModule", "InitContext", "InputModule", "InputSite", "Method", "OutputModule", "OutputSite",
    "ParameterModule", "ParameterSite", "RatePoint", "RateRule", "Site", "TrainedCopy", "attach", "attached",
    "base_name", "cached_values", "capture_keys_and_values", "detach", "kernel_serves", "merge", "merge_and_measure",
    "packed", "packing", "place", "prove_reads_embeddings", "route", "uncalled", "unplaced", "why_mask_is_needed",
    "why_not_cudnn", "why_not_packed",
]  # fmt: skip
