"""The core: the contract of methods and deltas, the four kinds of site, routing, attach and detach.

Each file imports only files that stand above it here:

    site, modules           plain values, and the modules that act at sites
    row_groups, layout      whose modules act on which rows of a batch
    absent_weights, foreign_layers  models that nothing can be attached to as they are
    places, frames          where a model's parts are after it was changed, and calls that left a route behind
    rate_rule               a method's learning rate by the base's size
    target_parameters       matrices that a config names, and what is said of those it leaves out
    target_names            which linears a user's names mean, and names that say exactly a set of them
    peft_config             what PEFT's config says of places, and which of its keys are read
    slots                   where these modules stand in the model
    trained_copy            the module that stands for one of the base's own, with weights of its own
    forward_state           what is in force in a forward pass
    method                  the contract of a method
    hooks/                  what acts inside a forward pass
    folder, delta           one delta, and its files
    table_route             rows that read operands by slot
    open_sites, attachment  the deltas of one model
    slot_tables             operands of many deltas by slot
    packed_batches          several documents in one sequence
    probes/                 what is proved by running the base
    tuned_base              full fine-tuning's delta
    attaching, routing, merging, shelving  the verbs
"""

from spectune.deltas.attaching import attach, attached, check_can_attach, detach, place, unplaced
from spectune.deltas.attachment import Attachment, BaseFacts
from spectune.deltas.delta import Delta
from spectune.deltas.folder import base_name
from spectune.deltas.layout import Route
from spectune.deltas.merging import merge, merge_and_measure
from spectune.deltas.method import Fitted, InitContext, Method, plain_tokens
from spectune.deltas.modules import (
    AttentionModule,
    DeltaModule,
    EntryModule,
    InputModule,
    Kind,
    Operands,
    OutputModule,
    ParameterModule,
)
from spectune.deltas.packed_batches import packed, packing
from spectune.deltas.peft_config import Placed, check_ia3_keys, check_keys, check_lora_keys, placed
from spectune.deltas.probes.agreement import agree, apart
from spectune.deltas.probes.attention_calls import why_not_cudnn
from spectune.deltas.probes.base_runs import cached_values, capture_keys_and_values
from spectune.deltas.probes.documents import kernel_serves, why_not_packed
from spectune.deltas.probes.embeddings import prove_reads_embeddings
from spectune.deltas.probes.right_padding import why_mask_is_needed
from spectune.deltas.probes.survey import uncalled
from spectune.deltas.rate_rule import SWEEPS, TINKER, BaseRate, RatePoint, RateRule
from spectune.deltas.routing import route
from spectune.deltas.shelving import hold_base, is_aside, put_back, set_aside
from spectune.deltas.site import AttentionSite, InputSite, MatrixSite, OutputSite, ParameterSite, Site
from spectune.deltas.slot_tables import SlotTables, gains_by_tables, why_not_in_tables
from spectune.deltas.stacking import Stacking
from spectune.deltas.table_route import TableRoute
from spectune.deltas.target_names import (
    ALL_LINEAR,
    Search,
    check_patterns,
    checked_pattern,
    checked_targets,
    ends_with,
    exact_names,
    left_out,
    linears_alone,
    peft_targets,
    same_targets,
    targets,
)
from spectune.deltas.target_parameters import (
    expert_words,
    experts_left_out,
    parameters_known,
    parameters_named,
    peft_keys,
    told_apart,
)
from spectune.deltas.trained_copy import CopySite, TrainedCopy

__all__ = [
    "ALL_LINEAR", "SWEEPS", "TINKER", "Attachment", "AttentionModule", "AttentionSite", "BaseFacts", "BaseRate",
    "CopySite", "Delta", "DeltaModule", "EntryModule", "Fitted", "InitContext", "InputModule", "InputSite", "Kind",
    "MatrixSite", "Method", "Operands", "OutputModule", "OutputSite", "ParameterModule", "ParameterSite", "Placed",
    "RatePoint", "RateRule", "Route", "Search", "Site", "SlotTables", "Stacking", "TableRoute", "TrainedCopy", "agree",
    "apart", "attach", "attached", "base_name", "cached_values", "capture_keys_and_values", "check_can_attach",
    "check_ia3_keys", "check_keys", "check_lora_keys", "check_patterns", "checked_pattern", "checked_targets",
    "detach", "ends_with", "exact_names", "expert_words", "experts_left_out", "gains_by_tables", "hold_base",
    "is_aside", "kernel_serves", "left_out", "linears_alone", "merge", "merge_and_measure", "packed", "packing",
    "parameters_known", "parameters_named", "peft_keys", "peft_targets", "place", "placed", "plain_tokens",
    "prove_reads_embeddings", "put_back", "route", "same_targets", "set_aside", "targets", "told_apart",
    "uncalled", "unplaced", "why_mask_is_needed", "why_not_cudnn", "why_not_in_tables", "why_not_packed",
]  # fmt: skip
