"""Folders that neither spectune nor PEFT wrote: mlx-lm's are read, the others are named, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spectune.deltas import attached
from spectune.errors import DataError
from spectune.families import describe
from spectune.methods import DoRA, LoRA
from spectune.storage import load_delta
from tests.contract.conftest import tokens
from tests.contract.families import llama
from tests.deltas.test_target_names import with_a_vision_tower
from tests.support import make_model

KEYS = ("self_attn.q_proj", "mlp.down_proj")


def mlx_folder(folder: Path, model: Any, *, kind: str = "lora", before: str = "", **config: Any) -> dict[str, Tensor]:
    """As mlx-lm writes it for the last two layers; returns the weights that each linear has with it, in float64."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    tensors, merged = {}, {}
    for linear in describe(model).linears:
        if "layers.0." in linear.path or not linear.path.endswith(KEYS):
            continue
        a, b = (
            torch.randn(linear.in_features, 4, generator=generator),
            torch.randn(4, linear.out_features, generator=generator),
        )
        weight = model.get_submodule(linear.path).weight.detach().double()
        new = weight + 0.05 * (a.double() @ b.double()).T
        name = before + linear.path[linear.path.index("layers.") :]
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        if kind == "dora":
            tensors[f"{name}.m"] = 1 + torch.rand(linear.out_features, generator=generator)
            new = tensors[f"{name}.m"].double()[:, None] * new / new.norm(dim=1, keepdim=True)
        merged[linear.path] = new
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 0.05, "dropout": 0.0, "keys": list(KEYS)}
    content = {
        "fine_tune_type": kind,
        "num_layers": 2,
        "lora_parameters": parameters,
        "model": "m",
        "iters": 9,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return merged


def base() -> Any:
    torch.manual_seed(7)
    return llama().eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens()).logits
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "method"), [("lora", LoRA), ("dora", DoRA)])
def test_mlx_lms_folders_are_read(kind: str, method: type[LoRA], tmp_path: Path) -> None:
    """By `y + scale (x a) b`, and DoRA's rows of `m`; what is saved again is PEFT's."""
    truth = base()
    for path, weight in mlx_folder(tmp_path / "mlx", truth, kind=kind, before="model.").items():
        truth.get_submodule(path).weight.data = weight.float()
    model = base()
    delta = load_delta(model, tmp_path / "mlx", "task")
    assert type(delta.method) is method
    assert float((logits(model) - logits(truth)).abs().max()) <= 1e-5
    delta.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert float((logits(back) - logits(truth)).abs().max()) <= 1e-5


def test_mlx_lm_may_call_what_stands_before_the_layers_otherwise(tmp_path: Path) -> None:
    """Its vision-language models are `language_model.model.layers`, those of transformers `model.language_model`."""
    mlx_folder(tmp_path / "mlx", with_a_vision_tower(), before="language_model.model.")
    paths = {site.path for site, _ in load_delta(with_a_vision_tower(), tmp_path / "mlx", "task").sites}
    assert paths == {f"model.language_model.layers.1.{key}" for key in KEYS}


MLX: dict[str, tuple[dict[str, Any], str]] = {
    "whole layers": ({"fine_tune_type": "full"}, "trained whole layers.*mlx_lm.fuse"),
    "another kind": ({"fine_tune_type": "vera"}, "expected fine_tune_type lora, dora or full"),
    "no scale": ({"lora_parameters": {"rank": 4}}, "expected two numbers"),
    "an early scale": ({"lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0}}, r"scale \* alpha / rank"),
    "another rank": ({"lora_parameters": {"rank": 8, "scale": 1.0}}, "wrong shape"),
    "no parameters": ({"lora_parameters": None}, "expected fine_tune_type"),
    "a rank of none": ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "values that are refused"),
}


@pytest.mark.parametrize("case", MLX)
def test_of_mlx_lms_what_is_no_low_rank_change_of_linears_is_refused(case: str, tmp_path: Path) -> None:
    config, said = MLX[case]
    mlx_folder(tmp_path / "mlx", base(), before="model.", **config)
    model = base()
    with pytest.raises(DataError, match=f"(?s)mlx.*{said}"):
        load_delta(model, tmp_path / "mlx")
    assert not attached(model)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.switch_mlp.up_proj.lora_a", "model.embed_tokens.lora_a", "lm_head.bias"]
)
def test_of_mlx_lms_tensors_for_other_modules_are_named(name: str, tmp_path: Path) -> None:
    mlx_folder(tmp_path / "mlx", base(), before="model.")
    save_file({name: torch.ones(2, 4)}, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_delta(base(), tmp_path / "mlx")


def holding(folder: Path, *names: str, **config: Any) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


HUB = {"config": {"architecture": "lora", "r": 8}, "model_type": "gpt2", "version": "adapters.1.2.0", "name": "a"}


def test_other_formats_are_named_with_the_way_out(tmp_path: Path) -> None:
    folders = {
        r"adapter-hub's adapters library \(adapters\.1\.2\.0; architecture lora.*merge_adapter": holding(
            tmp_path / "a", "pytorch_adapter.bin", **HUB
        ),
        r"architecture bottleneck.*spectune\.BottleneckAdapter": holding(
            tmp_path / "b", **{**HUB, "config": {"mh_adapter": False, "output_adapter": True}}
        ),
        "is a whole model, not a delta: load it as the base": holding(
            tmp_path / "c", "config.json", "model.safetensors"
        ),
        r"a GGUF file for llama\.cpp": holding(tmp_path / "d", "adapter.gguf"),
        "diffusers' for an image model": holding(tmp_path / "e", "pytorch_lora_weights.safetensors"),
        r"without adapter_config\.json": holding(tmp_path / "f", "adapter_model.safetensors"),
        "kohya's": holding(tmp_path / "g", "style_v2.safetensors"),
        "mlx-lm's without its": holding(tmp_path / "h", "adapters.npz"),
        "a pickle, which can run any code": holding(
            tmp_path / "i", "adapter_model.bin", peft_type="LORA", r=4, lora_alpha=8, target_modules=["c_attn"]
        ),
        "neither .* nor": holding(tmp_path / "j", "notes.txt"),
    }
    files = {
        "a GGUF file, for llama": tmp_path / "d" / "adapter.gguf",
        "is not a folder but a file": tmp_path / "f" / "adapter_model.safetensors",
        r"snapshot_download\('someone/some-lora'\)": Path("someone/some-lora"),
    }
    model = make_model()
    for said, path in {**folders, **files}.items():
        with pytest.raises(DataError, match=said):
            load_delta(model, path)
    assert not attached(model)
