"""LoRA as llama.cpp's adapter file, and the proof of it by reading it back.

The file is what llama.cpp's `convert_lora_to_gguf.py` writes of PEFT's folder: `general.type` "adapter",
`adapter.type` "lora", `adapter.lora.alpha`, and for each weight `W` of the base two tensors, `W.lora_a` `[r, in]` and
`W.lora_b` `[out, r]`, float32, under llama.cpp's names. llama.cpp adds `alpha / r * B (A x)`, with one alpha for all
and `r` of each tensor (`llama_adapter_lora_weight::get_scale`): where a linear has another scale (patterns, rsLoRA),
what is left of it is multiplied into its B. Rows of B go where llama.cpp's converter of whole models puts the rows of W
(queries and keys of Llama for its rotary layout, GPT-NeoX's fused q/k/v apart).

One thing is otherwise: the converter transposes GPT-2's weights, which are `Conv1D`, and with them A and B, although
PEFT's A is `[r, in]` there, too. `llama-adapter.cpp` checks A against the weight's inputs, so here they stay.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectune.deltas import Delta
from spectune.deltas.peft_config import PREFIX
from spectune.errors import ConfigError, ExportError, some
from spectune.files.atomic import atomic_folder
from spectune.methods.lora import LoRA
from spectune.storage.export import check_format

GGUF_FILE = "adapter.gguf"
#: A and B are copied, and a folded scale is one rounding in float32
_TOLERANCE = 1e-6

#: of a linear's name, config and number of outputs: where the rows of W go, `W_there = W[order]`; None: they stay
Order = Callable[[str, Any, int], Tensor | None]


def _stay(leaf: str, config: Any, rows: int) -> Tensor | None:
    return None


def _rotary_halves(leaf: str, config: Any, rows: int) -> Tensor | None:
    """`LlamaModel.permute`: each head's two halves are interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(leaf)
    if heads is None:
        return None
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _fused_by_head(leaf: str, config: Any, rows: int) -> Tensor | None:
    """`GPTNeoXModel`: q, k and v of each head become all q, all k, all v."""
    if leaf != "query_key_value":
        return None
    return torch.arange(rows).reshape(config.num_attention_heads, 3, -1).swapaxes(0, 1).reshape(-1)


@dataclass(frozen=True)
class _Architecture:
    """llama.cpp's name of a model type, the name of its decoder in checkpoints, and where rows go."""

    name: str
    root: str = "model"
    order: Order = _stay


#: by transformers' model type, as llama.cpp's converters register them (conversion/*.py): those whose weights need
#: nothing beyond what stands here
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "gemma": _Architecture("GEMMA"),
    "gemma2": _Architecture("GEMMA2"),
    "gemma3": _Architecture("GEMMA3"),
    "gemma3_text": _Architecture("GEMMA3"),
    "gpt2": _Architecture("GPT2", "transformer"),
    "gpt_neox": _Architecture("GPTNEOX", "gpt_neox", _fused_by_head),
    "granite": _Architecture("GRANITE", order=_rotary_halves),
    "llama": _Architecture("LLAMA", order=_rotary_halves),
    "mistral": _Architecture("LLAMA", order=_rotary_halves),
    "mixtral": _Architecture("LLAMA", order=_rotary_halves),
    "olmo": _Architecture("OLMO", order=_rotary_halves),
    "olmo2": _Architecture("OLMO2"),
    "olmo3": _Architecture("OLMO2"),
    "phi": _Architecture("PHI2"),
    "phi3": _Architecture("PHI3"),
    "qwen2": _Architecture("QWEN2"),
    "qwen3": _Architecture("QWEN3"),
    "smollm3": _Architecture("SMOLLM3", order=_rotary_halves),
    "starcoder2": _Architecture("STARCODER2"),
}


@dataclass(frozen=True)
class _Pair:
    """One linear's A `[r, in]` and B `[out, r]` in the file's layout, and the scale they have here."""

    path: str
    name: str
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    order: Tensor | None


@dataclass(frozen=True)
class GgufProof:
    """What was read back of an adapter file, against the delta: the change of each weight, `scale * B A`."""

    weights: int
    largest: float
    largest_change: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "engine": "gguf.GGUFReader", "weights": self.weights, "largest_difference_of_changes": self.largest,
            "largest_change": self.largest_change, "caveat": _CAVEAT,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"read back with gguf's GGUFReader: {self.weights} weights, each changed as the delta changes it (largest "
            f"difference {self.largest:.3g}, largest change {self.largest_change:.3g})\n  {_CAVEAT}"
        )


_CAVEAT = "llama.cpp itself has not run it: spectune has no build of it to ask"


def write_gguf_lora(delta: Delta, folder: str | Path) -> Path:
    """`adapter.gguf` for `llama-cli --lora`, float32; atomically. Returns the folder.

    Raises:
        ConfigError: the `gguf` package is not installed; the method is not LoRA; llama.cpp has no such base, or no such
            weight.
        WriteError: the disk is full, read-only or broken.
    """
    gguf = gguf_package()
    check_format(delta, "gguf-lora")
    architecture = _architecture(delta)
    pairs = _pairs(delta, gguf)
    # the alpha that most have as it is; scale * r is what llama.cpp divides by r again
    alpha = Counter(pair.scale * pair.lora_a.shape[0] for pair in pairs).most_common(1)[0][0]
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]]
        writer = gguf.GGUFWriter(temporary / GGUF_FILE, arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(delta.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for pair in pairs:
            left = pair.scale * pair.lora_a.shape[0] / alpha
            writer.add_tensor(f"{pair.name}.lora_a", pair.lora_a.numpy())
            writer.add_tensor(f"{pair.name}.lora_b", (pair.lora_b * left if left != 1 else pair.lora_b).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder


def prove_gguf_lora(folder: str | Path, delta: Delta) -> GgufProof:
    """Read an adapter file back with gguf's own reader, and compare the change of each weight with the delta's, through
    the inverse of llama.cpp's order of rows. llama.cpp itself is not run.

    Raises:
        ExportError: a weight is missing, too many, or changed otherwise; the file is not an adapter's.
        ConfigError: the `gguf` package is not installed.
    """
    gguf = gguf_package()
    reader = gguf.GGUFReader(Path(folder) / GGUF_FILE)
    wrong = _wrong_keys(reader, gguf, _architecture(delta))
    alpha = _key(reader, gguf.Keys.Adapter.LORA_ALPHA) or 0.0
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    expected = {f"{pair.name}.{end}" for pair in _pairs(delta, gguf) for end in ("lora_a", "lora_b")}
    wrong += [f"missing: {name}" for name in sorted(expected - set(tensors))]
    wrong += [f"surplus: {name}" for name in sorted(set(tensors) - expected)]
    largest = largest_change = 0.0
    pairs = [] if wrong else _pairs(delta, gguf)
    for pair in pairs:
        theirs_a, theirs_b = tensors[f"{pair.name}.lora_a"], tensors[f"{pair.name}.lora_b"]
        if theirs_a.shape != pair.lora_a.shape or theirs_b.shape != pair.lora_b.shape:
            wrong.append(f"{pair.name}: A {list(theirs_a.shape)}, B {list(theirs_b.shape)}")
            continue
        there = _back(theirs_b, pair.order).double() @ theirs_a.double() * (alpha / theirs_a.shape[0])
        here = _back(pair.lora_b, pair.order).double() @ pair.lora_a.double() * pair.scale
        apart, change = float((there - here).abs().max()), float(here.abs().max())
        largest, largest_change = max(largest, apart), max(largest_change, change)
        if not apart <= _TOLERANCE * change:
            wrong.append(f"{pair.name}: its change differs by up to {apart:.3g}, of {change:.3g}")
    if wrong:
        raise ExportError(f"{GGUF_FILE} is not this delta: {some(wrong)}. It is not kept; please report it")
    return GgufProof(len(pairs), largest, largest_change)


def gguf_package() -> Any:
    """The package `gguf`, llama.cpp's own. Raises ConfigError: it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "llama.cpp's files are written with its own package, which is not installed: pip install gguf (or "
            "spectune[gguf])"
        ) from error


def _pairs(delta: Delta, gguf: Any) -> list[_Pair]:
    """The delta's linears as the file has them. Raises ConfigError: what llama.cpp's adapters cannot hold, by name."""
    architecture, config = _architecture(delta), delta.model.config.get_text_config()
    config_as_written, tensors = delta.method.to_folder(delta.state_dict(), delta.family)
    method = LoRA.from_peft_config(config_as_written)  # what a reader of PEFT's folder would make of it
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], len(delta.family.layers))
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        path, _, end = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if end not in ("lora_A", "lora_B"):
            problems.append(f"{key.removeprefix(PREFIX)}: only A and B of linears")
            continue
        found.setdefault(path, {})[end] = tensor.detach().float().cpu()
    pairs, linears = [], {linear.path for linear in delta.family.linears}
    for path, parts in found.items():
        name = names.get_name(_checkpoint_name(path, delta, architecture))
        if name is None or path not in linears:
            problems.append(f"{path}: llama.cpp has no such weight of a {config.model_type}")
            continue
        order = architecture.order(path.rpartition(".")[2], config, parts["lora_B"].shape[0])
        lora_b = parts["lora_B"] if order is None else parts["lora_B"][order]
        assert method is not None, "check_format has seen a LoRA"
        lora_a = parts["lora_A"].contiguous()
        pairs.append(_Pair(path, f"{name}.weight", lora_a, lora_b.contiguous(), method.scale(path), order))
    if problems:
        raise ConfigError(
            f"llama.cpp's adapter files cannot hold all of this LoRA: {some(problems)}. Merge instead: spectune export "
            "--format merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    return pairs


def _architecture(delta: Delta) -> _Architecture:
    model_type = delta.model.config.model_type
    if model_type not in _ARCHITECTURES:
        raise ConfigError(
            f"--format gguf-lora knows how llama.cpp lays out {', '.join(_ARCHITECTURES)}, and this base is a "
            f"{model_type}: spectune export --format merged writes a model that convert_hf_to_gguf.py takes, where "
            "llama.cpp has the type"
        )
    return _ARCHITECTURES[model_type]


def _checkpoint_name(path: str, delta: Delta, architecture: _Architecture) -> str:
    """The name that gguf's map knows: inside a model of images, too, the decoder's is the text model's own."""
    return architecture.root + path.removeprefix(delta.family.decoder)


def _back(lora_b: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return lora_b
    restored = torch.empty_like(lora_b)
    restored[order] = lora_b
    return restored


def _key(reader: Any, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def _wrong_keys(reader: Any, gguf: Any, architecture: _Architecture) -> list[str]:
    expected = {
        gguf.Keys.General.TYPE: "adapter", gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]],
    }  # fmt: skip
    given = {name: _key(reader, name) for name in expected}
    return [f"{name} is {given[name]!r}, not {value!r}" for name, value in expected.items() if given[name] != value]
