"""What single model types need in their tiny config besides the sizes that `configs.py` makes small.

Keys that begin with "=" are needed to build the default config already. A dict is for a config inside the config.
"""

from __future__ import annotations

from typing import Any

_INKLING = {"unpadded_vocab_size": 128, "d_rel": 8, "rel_extent": 16}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    "hc_lowrank": 8,
    "ple_embed_dim": 48,
    "ngram_vocab_size_base": 256,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_GEMMA_3N = {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
             "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
             "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}  # fmt: skip
_GEMMA_4 = {"num_hidden_layers": 4, "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
_DOTS_SLIDING = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                 "head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
_DOTS = {"layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "head_dim": 16,
         "index_topk": 6, **{f"swa_{name}": value for name, value in _DOTS_SLIDING.items()}}  # fmt: skip
_ASSISTANT = {"=text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}

ODD: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"mamba_num_heads": 8},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
    },
    "phimoe": {"router_jitter_noise": 0.9},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "topk_method": "greedy", "n_group": None},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS,
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 2,
    },
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma3n_text": _GEMMA_3N,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": {"text_config": _GEMMA_4},
    "gemma4_unified_text": _GEMMA_4,
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "inkling2_text": _INKLING,
    "inkling2_loop_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
        "attn_layers": ("local", "lsh", "local"),
    },
    "roc_bert": {
        "shape_vocab_size": 128,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 128,
        "pronunciation_embed_dim": 8,
    },
    "xlm": {"causal": True},
    "xlstm": {"mode": "inference", "hidden_size": 64, "embedding_dim": 64, "autocast_kernel_dtype": "float32"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
