"""A tiny config of any model type: its default config, every size in it made small.

Sizes are told by the names of fields, so that a type which nobody here has heard of is tried the same way. What a type
needs besides stands in `odd.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from benchmarks.coverage.odd import ODD
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 128
CONTEXT = 64
HEADS = 4
#: a field of one of these names has this value, wherever it stands
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "embedding_size", "embed_dim", "model_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size", "d_embed"), 32),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "model_max_length",
            "context_length",
            "max_target_positions",
            "original_max_position_embeddings",
        ),
        CONTEXT,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "swa_num_attention_heads",
            "conf_num_attention_heads",
            "num_query_groups",
            "n_mamba_heads",
            "index_n_heads",
            "linear_num_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "dff",
            "dim_ff",
            "d_ff",
            "d_inner",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "feed_forward_size",
            "intermediate_size_mlp",
            "moe_intermediate_size",
            "dense_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "mlp_dim",
        ),
        48,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "topk_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "linear_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_size", "kv_channels"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv", "dim_head", "d_head"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 6),
    **dict.fromkeys(("attention_chunk_size", "local_attention", "local_attention_window_len"), 6),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads",), HEADS),
    **dict.fromkeys(("num_layers_per_stack", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "laurel_rank", "adapter_rank", "loop_gate_rank"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "router_hidden_size", "rotary_dim"), 8),
}
#: the depth of the model, one of these
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
)
#: heads of keys and values: as many as of queries where the default has it so, or leaves it open
KEY_VALUE_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "kv_n_heads")
DEPTH = 3
MOST_LAYERS = 4


class NoConfigError(Exception):
    """The type's default config cannot be made, or made small; the message is transformers' own."""


def tiny_config(model_type: str, **fields: Any) -> PretrainedConfig:
    """The config of a tiny causal language model of this type; `fields` override everything.

    Raises:
        NoConfigError: with what transformers says.
    """
    kind = CONFIG_MAPPING[model_type]
    odd = ODD.get(model_type, {})
    try:
        with _quiet():
            return _shrunk(kind, {**odd, **fields})
    except Exception as error:
        raise NoConfigError(f"{type(error).__name__}: {error}") from error


def _shrunk(kind: type[PretrainedConfig], given: dict[str, Any]) -> PretrainedConfig:
    needed = {name: value for name, value in given.items() if name.startswith("=")}
    default = kind(**{name.removeprefix("="): value for name, value in needed.items()})
    given = {name.removeprefix("="): value for name, value in given.items()}
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(default.to_dict())
    values = {name: _value(default, name) for name in names}
    small: dict[str, Any] = {}
    for name, value in values.items():
        nested = given.get(name)
        if isinstance(value, PretrainedConfig):
            small[name] = _shrunk(type(value), nested if isinstance(nested, dict) else {})
        elif name == "head_dim" and value is None:
            small[name] = SIZES[name]
        elif name in KEY_VALUE_HEADS and isinstance(value, int):
            heads = next((values[h] for h in ("num_attention_heads", "swa_num_attention_heads") if values.get(h)), 0)
            small[name] = HEADS if value == heads else 1 if value == 1 else 2
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = SIZES[name]
        elif _is_dropout(name) and isinstance(value, int | float):
            small[name] = type(value)(0)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            small[name] = VOCABULARY - 1
    small |= _layers(values)
    if "is_decoder" in values and not getattr(default, "is_encoder_decoder", False):
        small["is_decoder"] = True  # types that are encoders by default
    tokens = {name: 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in values}
    # what the constructor takes and keeps under another name goes through too
    own = {name: value for name, value in given.items() if not isinstance(values.get(name), PretrainedConfig)}
    return kind(**{**tokens, **small, **own})


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # layers differ in it, and transformers refuses to name one value
        return config.__dict__.get(name)


def _is_dropout(name: str) -> bool:
    return ("dropout" in name or "pdrop" in name or name.endswith("layerdrop")) and "classifier" not in name


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """Depth, and every list with an entry for each layer cut to layers of all kinds that there are."""
    depths = {name: values[name] for name in DEPTHS if isinstance(values.get(name), int)}
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple) and value and len(value) in depths.values() and name != "architectures"
    }
    picks = _of_all_kinds(list(zip(*map(_keys, lists.values()), strict=False))) if lists else list(range(DEPTH))
    small: dict[str, Any] = {name: len(picks) for name in depths}
    for name, value in lists.items():
        small[name] = type(value)(value[index] for index in picks)
    return small


def _keys(value: list[Any]) -> list[str]:
    return [repr(entry) for entry in value]


def _of_all_kinds(kinds: list[Any]) -> list[int]:
    """Indices of layers, in order: the first of each kind, and more from the front up to `DEPTH`."""
    first = list(dict.fromkeys(kinds.index(kind) for kind in kinds))[:MOST_LAYERS]
    more = [index for index in range(len(kinds)) if index not in first]
    return sorted(first + more[: max(0, DEPTH - len(first))])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
