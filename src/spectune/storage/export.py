"""Folders for other programs: PEFT and vLLM, plain transformers, and engines that take prompt embeddings.

llama.cpp's adapter file is written by `gguf_adapter.py`; what was written is run by `export_proof.py`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.deltas import Delta, InputModule
from spectune.deltas.folder import CONFIG_FILE, OUR_FILE, name_base
from spectune.errors import ConfigError
from spectune.files.atomic import atomic_folder
from spectune.files.regular import plain_file
from spectune.files.tensor_file import write_tensors
from spectune.storage.manifest import check_digests, read_manifest

PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"


#: by format: whether a delta has it, by what its method itself offers, and why another one has not; the usual one first
_FORMATS: dict[str, tuple[Callable[[Delta], bool], str]] = {
    "peft": (lambda d: "peft_type" in d.method.to_folder(d.state_dict(), d.family)[0], "PEFT has no such method"),
    "merged": (lambda d: d.method.can_merge, "it does not act as a change of the base's weights"),
    "prompt-embeds": (
        lambda d: _only_virtual_tokens(d) is not None,
        "it is not made of embeddings that stand before the text",
    ),
    "gguf-lora": (lambda d: _plain_lora(d), "llama.cpp's adapters are LoRA, and nothing beside it"),
}


def export_formats(delta: Delta) -> list[str]:
    """The formats that a delta's method has, by what the method itself offers; the usual one first.

    Merging may still be refused by the base: quantised weights, or biases that its type does not have."""
    return [name for name, (has, _) in _FORMATS.items() if has(delta)]


def check_format(delta: Delta, wanted: str) -> None:
    """Raise ConfigError, in words, where the delta's method does not have this format."""
    formats = export_formats(delta)
    if wanted not in formats:
        others = " or ".join(f"--format {name}" for name in formats)
        instead = f"This one can be written as {others}." if others else "Keep its folder, and spectune.load_delta it."
        raise ConfigError(f"{delta.method.label} has no format {wanted!r}: {_FORMATS[wanted][1]}. {instead}")


def write_peft(delta: Delta, folder: str | Path) -> Path:
    """`adapter_config.json` and `adapter_model.safetensors` as PEFT and vLLM read them, and nothing else; atomically.

    The config names the base, as `AutoPeftModelForCausalLM` needs it. Returns the folder.

    Raises:
        ConfigError: PEFT has no such method.
        WriteError: the disk is full, read-only or broken.
    """
    folder = Path(folder)
    check_format(delta, "peft")
    with atomic_folder(folder) as temporary:
        delta.files.write(temporary)
        name_base(temporary / CONFIG_FILE, _base_name(delta.model))
    return folder


def write_prompt_embeds(delta: Delta, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """One tensor `prompt_embeds` `[virtual tokens, hidden]`, and a README.md that says how to use it; atomically.

    Args:
        dtype: of the tensor; None: the base's. Returns the folder.

    Raises:
        ConfigError: the method is not made of embeddings before the text.
        WriteError: the disk is full, read-only or broken.
    """
    folder = Path(folder)
    check_format(delta, "prompt-embeds")
    module = _only_virtual_tokens(delta)
    assert module is not None
    with torch.no_grad():
        virtual = module().detach().to(dtype or delta.model.dtype).cpu().contiguous()
    base = _base_name(delta.model)
    with atomic_folder(folder) as temporary:
        metadata = {"format": "pt", "base_model_name_or_path": base}
        write_tensors(temporary / PROMPT_EMBEDS_FILE, {"prompt_embeds": virtual}, metadata)
        (temporary / "README.md").write_text(_prompt_embeds_page(virtual, base), encoding="utf-8")
    return folder


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """A plain model (what `merge` gives) and its tokenizer as a transformers folder; atomically. Returns the folder.
    Raises WriteError: the disk is full, read-only or broken, as transformers' own writers met it."""
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def copy_model(source: Path, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """A fully tuned model's folder as a plain transformers folder, weights bit for bit, with the tokenizer.

    Raises:
        DataError: the folder is not as it was saved, or holds a link out of itself.
        WriteError: the disk is full, read-only or broken.
    """
    folder = Path(folder)
    if (found := read_manifest(source / OUR_FILE)) is not None:
        check_digests(found[0], sorted(source.glob("*.safetensors")) or [source / "model.safetensors"])
    with atomic_folder(folder) as temporary:
        for file in source.iterdir():
            if file.name != OUR_FILE and not file.is_dir() and plain_file(file):
                shutil.copyfile(file, temporary / file.name)
        tokenizer.save_pretrained(temporary)
    return folder


def _only_virtual_tokens(delta: Delta) -> InputModule | None:
    """The module of a delta that is embeddings before the text and nothing else."""
    modules = [module for _, module in delta.sites]
    return modules[0] if len(modules) == 1 and isinstance(modules[0], InputModule) else None


def _plain_lora(delta: Delta) -> bool:
    """LoRA whose change is `scale * B A` alone: not of magnitudes, and not from a start that the base gave up its own
    weights for, and with no head beside it."""
    config, _ = delta.method.to_folder(delta.state_dict(), delta.family)
    starts = config.get("init_lora_weights", True)
    beside = config.get("use_dora") or delta.family.trained_head
    return config.get("peft_type") == "LORA" and not beside and starts in (True, "gaussian")


def _base_name(model: PreTrainedModel) -> str:
    """The hub id, or the absolute path of a local folder: the export may be read from elsewhere; empty where the base
    was loaded from neither."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _prompt_embeds_page(virtual: Tensor, base: str) -> str:
    count, hidden = virtual.shape
    dtype = str(virtual.dtype).removeprefix("torch.")
    return f"""# Prompt embeddings

`{PROMPT_EMBEDS_FILE}` holds one tensor, `prompt_embeds` [{count} virtual tokens, {hidden} hidden], {dtype}, trained for
the base `{base}`.

Put it before the embedded text. No text token changes its embedding; positions count from the first virtual token on,
as every engine does without being told. Tokenise the text as in training: separator or chat template, and no special
tokens that were not there.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}
virtual = load_file("{PROMPT_EMBEDS_FILE}")["prompt_embeds"]
tokenizer = AutoTokenizer.from_pretrained(base)
embed = AutoModelForCausalLM.from_pretrained(base, dtype=virtual.dtype).get_input_embeddings()
with torch.no_grad():
    text = embed(tokenizer("...", return_tensors="pt").input_ids[0])
prompt = torch.cat([virtual, text])  # [virtual + text tokens, {hidden}]
```

vLLM:

```python
from vllm import LLM

llm = LLM(model=base, enable_prompt_embeds=True)  # a server: vllm serve ... --enable-prompt-embeds
llm.generate({{"prompt_embeds": prompt}})
```

SGLang, its server started with `--disable-radix-cache` (that cache is keyed by token ids):

```python
import requests

requests.post("http://localhost:30000/generate", json={{"input_embeds": prompt.float().tolist()}})
```
"""
