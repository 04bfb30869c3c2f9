"""Formats that are not read, by name, each with the way to one that is."""

from pathlib import Path
from typing import Any

from spectune.deltas.folder import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE
from spectune.errors import DataError

_OTHERS_LORA = ("pytorch_lora_weights.safetensors",)
_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_adapter_hub(config: dict[str, Any]) -> bool:
    """Whether adapter-hub's `adapters` wrote a config."""
    return "peft_type" not in config and isinstance(config.get("config"), dict | str) and "model_type" in config


def refuse_adapter_hub(folder: Path, config: dict[str, Any]) -> DataError:
    """The error for a folder of `adapters`: what it holds, and the way out."""
    inner = config["config"]
    kind = inner.get("architecture") if isinstance(inner, dict) else inner
    ours = {
        "lora": "LoRA", "prefix_tuning": "PrefixTuning", "prompt_tuning": "PromptTuning", "reft": None, "union": None,
    }  # fmt: skip
    near = ours.get(str(kind), "BottleneckAdapter")
    merges = (
        "model.merge_adapter(name) and model.save_pretrained(...) in adapters make a base of it that loads here. Or "
        if kind == "lora"
        else ""
    )
    train = f"train spectune.{near} on the same rows" if near else "it has no counterpart here"
    return DataError(
        f"{folder} was written by adapter-hub's adapters library ({config.get('version') or 'an early version'}; "
        f"architecture {kind or 'bottleneck'}, for a {config['model_type']}), whose layout is not read. "
        f"{merges}{train}."
    )


def refuse_path(path: Path) -> DataError:
    """The error for a path that is no folder: what the file is, or that there is none."""
    if path.suffix == ".gguf":
        return DataError(
            f"{path} is a GGUF file, for llama.cpp, and cannot be read back: give the delta's folder it was made of"
        )
    if path.is_file():
        return DataError(
            f"{path} is not a folder but a file; expected the folder that it stands in, with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} as PEFT or Delta.save wrote them"
        )
    named = str(path)
    hub = "" if path.is_absolute() or named.count("/") != 1 else (
        f" If it is on the hub: huggingface_hub.snapshot_download({named!r}) gives its folder."
    )  # fmt: skip
    return DataError(f"{path} is not a folder; expected one that Delta.save or PEFT wrote.{hub}")


def refuse_folder(folder: Path) -> DataError:
    """The error for a folder with neither of the two configs."""
    found = sorted(path.name for path in folder.iterdir())
    if ggufs := [name for name in found if name.endswith(".gguf")]:
        return DataError(f"{folder} holds {ggufs[0]}, a GGUF file for llama.cpp, which cannot be read back as a delta")
    if WEIGHTS_FILE in found:
        return DataError(
            f"{folder} holds {WEIGHTS_FILE} without {CONFIG_FILE}, which says its method, rank and scale: copy that too"
        )
    if "adapters.npz" in found or "adapters.safetensors" in found:
        return DataError(
            f"{folder} holds an adapter of mlx-lm's without its {CONFIG_FILE}, which says its rank and scale: copy "
            "that too, with adapters.safetensors (mlx.core.load and save_safetensors make it of an early version's "
            ".npz)"
        )
    images = [name for name in found if name in _OTHERS_LORA]
    if images:
        return DataError(
            f"{folder} holds {images[0]}, a LoRA of diffusers' for an image model: it fits no language model"
        )
    if "config.json" in found and any(name in found for name in _MODELS):
        return DataError(
            f"{folder} is a whole model, not a delta: load it as the base, spectune.load({str(folder)!r}) or --model"
        )
    weights = [name for name in found if name.endswith((".safetensors", ".bin", ".pt"))]
    if weights:
        return DataError(
            f"{folder} holds {weights[0]} and no {CONFIG_FILE}: a LoRA of kohya's or another tool's for image models, "
            f"or a folder that was copied in part. Expected {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT writes them"
        )
    return DataError(f"{folder} has neither {OUR_FILE} nor {CONFIG_FILE}: it is not a delta's folder")
