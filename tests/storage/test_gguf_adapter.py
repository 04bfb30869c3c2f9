"""llama.cpp's adapter file: what llama.cpp would make of it is what its converter would make of the merged weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from benchmarks.coverage.bases import make
from torch import Tensor

from spectune.deltas import Delta, Method, attach, merge
from spectune.errors import ConfigError, ExportError
from spectune.methods import DoRA, LoRA
from spectune.storage import gguf_adapter, prove_gguf_lora, write_gguf_lora

#: llama.cpp's names of linears, in the order of the types' own
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "c_attn": "attn_qkv", "attn.c_proj": "attn_output", "c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down", "query_key_value": "attn_qkv", "dense": "attn_output", "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down", "qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up",
}  # fmt: skip
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "gpt2": "gpt2", "gpt_neox": "gptneox", "phi3": "phi3", "qwen3": "qwen3",
    "gemma3": "gemma3", "granite": "granite",
}  # fmt: skip


def put_on(model_type: str, method: Method) -> Delta:
    delta = attach(make(model_type), method, "run")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return delta


def permute(weights: Tensor, n_head: int, n_head_kv: int | None) -> Tensor:
    """As conversion/llama.py has it."""
    if n_head_kv is not None and n_head != n_head_kv:
        n_head = n_head_kv
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def converted(model_type: str, leaf: str, weight: Tensor, config: Any) -> Tensor:
    """A base's weight as llama.cpp's converters of whole models lay it out."""
    if model_type == "gpt2":
        return weight.T
    if model_type == "gpt_neox" and leaf == "query_key_value":
        heads, width = config.num_attention_heads, config.hidden_size
        parts = weight.reshape((heads, 3, width // heads, width))
        return torch.cat([parts[:, i].reshape((-1, width)) for i in range(3)], dim=0)
    if ARCHITECTURES[model_type] in ("llama", "granite") and leaf in ("q_proj", "k_proj"):
        kv = config.num_key_value_heads if leaf == "k_proj" else config.num_attention_heads
        return permute(weight, config.num_attention_heads, kv)
    return weight


def read(folder: Path) -> tuple[gguf.GGUFReader, dict[str, Tensor]]:
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    return reader, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_llama_cpp_would_add_the_deltas_own_change(model_type: str, tmp_path: Path) -> None:
    delta = put_on(model_type, LoRA(r=4, lora_alpha=12))
    write_gguf_lora(delta, tmp_path / "out")
    proof = prove_gguf_lora(tmp_path / "out", delta)
    assert proof.weights == len(delta.sites)
    assert proof.largest == 0
    assert "llama.cpp itself has not run it" in str(proof)
    reader, tensors = read(tmp_path / "out")
    keys = {key: reader.get_field(key).contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert list(keys.values()) == ["adapter", "lora", ARCHITECTURES[model_type]]
    alpha = reader.get_field("adapter.lora.alpha").contents()
    assert alpha == 12
    config, merged = delta.model.config.get_text_config(), merge(delta.model, "run", check=False)
    assert len(tensors) == 2 * len(delta.sites)
    for site, _ in delta.sites:
        leaf = site.path.rpartition(".")[2]
        name = NAMES.get(".".join(site.path.split(".")[-2:])) or NAMES[leaf]
        layer = next(part for part in site.path.split(".") if part.isdigit())
        lora_a, lora_b = (tensors[f"blk.{layer}.{name}.weight.lora_{end}"] for end in "ab")
        bare, changed = (
            converted(model_type, leaf, model.get_submodule(site.path).weight.detach(), config)
            for model in (delta.model, merged)
        )
        found = bare + alpha / lora_b.shape[1] * lora_b @ lora_a
        assert float((found - changed).abs().max()) <= 1e-6 * float(changed.abs().max())


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=4, lora_alpha=12, use_rslora=True),
        LoRA(r=4, lora_alpha=12, rank_pattern={"q_proj": 2, "down_proj": 8}, alpha_pattern={"v_proj": 5}),
        LoRA(r=4, lora_alpha=12, use_rslora=True, rank_pattern={"q_proj": 3}),
    ],
)
def test_scales_that_differ_are_folded_into_b(method: LoRA, tmp_path: Path) -> None:
    delta = put_on("qwen3", method)
    write_gguf_lora(delta, tmp_path / "out")
    prove_gguf_lora(tmp_path / "out", delta)
    reader, tensors = read(tmp_path / "out")
    alpha, merged = reader.get_field("adapter.lora.alpha").contents(), merge(delta.model, "run", check=False)
    for site, _ in delta.sites:
        leaf, layer = site.path.rpartition(".")[2], site.path.split(".")[2]
        lora_a, lora_b = (tensors[f"blk.{layer}.{NAMES[leaf]}.weight.lora_{end}"] for end in "ab")
        bare, changed = (model.get_submodule(site.path).weight.detach() for model in (delta.model, merged))
        found = bare + alpha / lora_b.shape[1] * lora_b @ lora_a
        assert float((found - changed).abs().max()) <= 2e-6 * float(changed.abs().max())


def test_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = put_on("llama", LoRA(r=4, lora_alpha=12))
    add_float32, add_tensor, add_string = (
        getattr(gguf.GGUFWriter, name) for name in ("add_float32", "add_tensor", "add_string")
    )
    faults: dict[str, tuple[str, Any]] = {
        "its change differs": ("add_float32", lambda self, key, value: add_float32(self, key, value / 2)),
        "missing: blk.1.attn_v.weight.lora_b": (
            "add_tensor",
            lambda self, name, data: None if "1.attn_v.weight.lora_b" in name else add_tensor(self, name, data),
        ),
        "surplus: blk.1.attn_v.lora_b": (
            "add_tensor",
            lambda self, name, data: add_tensor(self, name.replace("1.attn_v.weight", "1.attn_v"), data),
        ),
        "adapter.type is 'control'": (
            "add_string",
            lambda self, key, value: add_string(self, key, "control" if key == "adapter.type" else value),
        ),
        "A [8, 4]": ("add_tensor", lambda self, name, data: add_tensor(self, name, data.T.copy())),
    }
    for place, (words, (name, wrong)) in enumerate(faults.items()):
        with monkeypatch.context() as patched:
            patched.setattr(gguf.GGUFWriter, name, wrong)
            write_gguf_lora(delta, tmp_path / str(place))
        with pytest.raises(ExportError) as refused:
            prove_gguf_lora(tmp_path / str(place), delta)
        assert words.replace("A [8, 4]", "A [") in str(refused.value)
    with monkeypatch.context() as patched:  # rows as transformers has them
        stay = gguf_adapter._Architecture("LLAMA")
        patched.setattr(gguf_adapter, "_ARCHITECTURES", {"llama": stay})
        write_gguf_lora(delta, tmp_path / "unpermuted")
    with pytest.raises(ExportError, match=r"attn_q\.weight: its change differs"):
        prove_gguf_lora(tmp_path / "unpermuted", delta)


def test_what_llama_cpp_cannot_hold_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"this base is a opt: .*convert_hf_to_gguf"):
        write_gguf_lora(put_on("opt", LoRA(r=2)), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"DoRA has no format 'gguf-lora': llama\.cpp's adapters are LoRA"):
        write_gguf_lora(put_on("llama", DoRA(r=2)), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        write_gguf_lora(put_on("llama", LoRA(r=2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
