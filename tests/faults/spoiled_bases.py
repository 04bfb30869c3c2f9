"""Damaged bases, through every command that loads one, and runs that were made on what they were before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.faults import spoiling, spoiling_tensors
from tests.faults.damage import Trial, kind
from tests.faults.kinds import Place
from tests.faults.scenes import BASE, BASES, CPU, FINISHED, QUICK, ROWS, UNFINISHED, copied, scene, with_runs

ON_BASE = {
    "validate": ("validate", "--model", BASE, "--data", ROWS, "--json"),
    "generate": ("generate", "name: Ada | town: Leeds\n", "--model", BASE, "--max-new-tokens", "6", *CPU, "--json"),
    "eval": ("eval", "--model", BASE, "--data", ROWS, "--generate-rows", "1", "--max-new-tokens", "4", *CPU, "--json"),
    "train": ("train", "--model", BASE, "--data", ROWS, "--output-dir", "new", *QUICK, *CPU, "--json"),
    "plan": ("plan", "--model", BASE, "--method", "lora", "--batch", "2", "--length", "32", *CPU, "--json"),
    "compare": ("compare", "--model", BASE, "--data", ROWS, "--methods", "lora", "--quick", "--dry-run",
    "--output-dir", "new", *QUICK, *CPU, "--json"),
}  # fmt: skip
#: what knows the base that it was made on
ON_RUN = {
    "generate --run": ("generate", "--run", FINISHED, "--rows", "1", "--max-new-tokens", "6", *CPU, "--json"),
    "eval --run": ("eval", "--run", FINISHED, "--data", ROWS, "--generate-rows", "1", "--max-new-tokens", "4", *CPU,
    "--json"),
    "resume": ("train", "--resume", "--output-dir", UNFINISHED, "--json"),
}  # fmt: skip
#: absurd values of fields that every family has
FIELDS: dict[str, list[Any]] = {
    "vocab_size": [0, -1, 10**9, 10**15, 299, 301, "300", None, 2.5, [300]],
    "hidden_size": [0, 33, 10**7, -4, "x"],
    "n_embd": [0, 33, 10**7, -4, "x"],
    "num_hidden_layers": [0, -1, 1, 3, 10**6, 10**9, "2", None, 1.5],
    "n_layer": [0, -1, 1, 3, 10**6, 10**9, "2", None, 1.5],
    "num_attention_heads": [0, 3, -1, 10**9, "4"],
    "n_head": [0, 3, -1, 10**9, "4"],
    "max_position_embeddings": [0, -1, 10**12, 8, "64"],
    "n_positions": [0, -1, 10**12, 8, "64"],
    "eos_token_id": [300, 10**9, -1, "0", None, [0, 999], 0.5, []],
    "pad_token_id": [300, 10**9, -5, "0", 0.5],
    "bos_token_id": [300, 10**9, -5, "0", 0.5],
    "model_type": ["", "nosuch", "bert", "llama", "gpt2", None, 4, "../x"],
    "architectures": [[], ["NoSuch"], ["BertModel"], "GPT2LMHeadModel", None, [4], ["os.system"]],
    "dtype": ["float99", "int8", None, 4, "float64", "bfloat16"],
    "torch_dtype": ["float99", "int8", 4],
    "tie_word_embeddings": ["yes", None, 4, False],
    "rope_theta": [0, -1, "x", 1e308],
    "rope_scaling": [{"type": "nosuch"}, {"rope_type": "linear", "factor": -1}, "x", [], {}],
    "hidden_act": ["nosuch", 4, None],
    "activation_function": ["nosuch", 4, None, "__import__('os')"],
    "attn_implementation": ["nosuch", "kernels-community/flash-attn3", "someone/kernel", 4],
    "_attn_implementation": ["kernels-community/flash-attn3", "someone/kernel:function"],
    "quantization_config": [{}, {"quant_method": "nosuch"}, {"quant_method": "gptq"}, "x", {"load_in_4bit": True}],
    "num_labels": [-1, 10**9, "2"],
    "id2label": [{"x": 1}, [], {"0": None}],
    "tokenizer_class": ["NoSuch", "PreTrainedTokenizer", 4, "os.system", None],
    "is_encoder_decoder": [True, "x"],
    "transformers_version": ["99.0.0", 4],
    "use_cache": ["x", False],
    "initializer_range": [-1, "x"],
    "layer_norm_epsilon": [-1, "x", 0],
    "rms_norm_eps": [-1, "x"],
}
CODE = """import os
os.mkdir({marker!r})
from transformers import *
from transformers import GPT2Config as MyConfig, GPT2LMHeadModel as MyModel, PreTrainedTokenizerFast as MyTokenizer
"""


def make(place: Place, random: Random, folder: Path) -> Trial:
    """A base with one thing wrong, and a command."""
    base = random.choices(BASES, weights=[4, 4, 2, 3, 1])[0]
    commands = ON_BASE if random.random() < 0.7 else ON_RUN
    origin = scene(place, base) if commands is ON_BASE else with_runs(place, base)
    name = random.choice(sorted(commands))
    copied(origin, folder)
    touched, what, names = _damaged(place, random, folder / BASE)
    if touched == "adapter_config.json":
        names = ("someone/model", "../x")  # then it is a delta, which may name its base
    return Trial(
        origin, commands[name], touched and f"{BASE}/{touched}", f"{base}: {what}",
        names=(BASE, FINISHED, UNFINISHED, *names) if commands is ON_RUN else (BASE, *names),
        knowable=commands is ON_RUN, hub=touched == "adapter_config.json" and name in ("eval", "generate"),
    )  # fmt: skip


def _damaged(place: Place, random: Random, base: Path) -> tuple[str, str, tuple[str, ...]]:
    """The file that was damaged, how, and what else a message may name."""
    files = sorted(path for path in base.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".txt"))
    weights = [path for path in files if path.suffix == ".safetensors"]
    how = random.choices(["file", "weights", "field", "code", "swap"], weights=[45, 25, 20, 12, 5])[0]
    if how == "field":
        what = _field(random, base)
        return what[0], what[1], ()
    if how == "code":
        return *_planted(random, base), ()
    if how == "swap":
        other = scene(place, random.choice(BASES[:3])) / BASE
        path = random.choice(files)
        theirs = other / path.name
        if theirs.is_file():
            path.unlink()
            shutil.copyfile(theirs, path)
            return path.name, f"is that of {other.parent.name}", ()
    path = random.choice(weights if how == "weights" else files)
    for _ in range(10):
        blows = (
            random.choice([spoiling.BYTES, spoiling_tensors.TENSORS, spoiling_tensors.TENSORS])
            if how == "weights"
            else None
        )
        what = random.choice(blows)(random, path) if blows else spoiling_tensors.strike(random, path)
        if what is not None:
            return path.name, what, ()
    return "", "nothing", ()


def _field(random: Random, base: Path) -> tuple[str, str]:
    """One field of the config (or of how text is generated, or of the tokenizer's) has a value that makes no sense."""
    path = base / "config.json"
    if random.random() < 0.25:
        path = base / random.choice(
            [n for n in ("generation_config.json", "tokenizer_config.json") if (base / n).exists()]
        )
    content = json.loads(path.read_text())
    known = [name for name in FIELDS if name in content] if random.random() < 0.7 else list(FIELDS)
    name = random.choice(known or list(FIELDS))
    value = random.choice(FIELDS[name])
    spoiling.changed(path, content | {name: value})
    return path.name, f"{name} is {value!r}"


def plant_model(base: Path, marker: Path, repository: str = "", *, other_type: bool = False) -> None:
    """Code of the base's own, in its folder or in somebody's on the hub, that leaves a mark."""
    (base / "modeling_x.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "MyConfig", "AutoModelForCausalLM": "MyModel"}
    content = json.loads((base / "config.json").read_text())
    content["auto_map"] = {auto: f"{repository}modeling_x.{name}" for auto, name in names.items()}
    spoiling.changed(base / "config.json", content | ({"model_type": "something-new"} if other_type else {}))


def _planted(random: Random, base: Path) -> tuple[str, str]:
    """Code, or what would fetch some, where a library may look for it."""
    marker = base.parent / "marker"
    kind = random.choice(
        ["auto_map", "auto_map", "tokenizer", "adapter", "bin", "bin alone", "index", "kernel", "hub code"]
    )
    if kind in ("auto_map", "hub code"):
        other = random.random() < 0.5
        plant_model(base, marker, "someone/repository--" if kind == "hub code" else "", other_type=other)
        return "config.json", f"{kind}{' of another type' if other else ''}"
    if kind == "tokenizer":
        (base / "tokenization_x.py").write_text(CODE.format(marker=str(marker)))
        content = json.loads((base / "tokenizer_config.json").read_text())
        content["auto_map"] = {"AutoTokenizer": ["tokenization_x.MyTokenizer", "tokenization_x.MyTokenizer"]}
        content["tokenizer_class"] = random.choice(["MyTokenizer", "NoSuchTokenizer", content.get("tokenizer_class")])
        spoiling.changed(base / "tokenizer_config.json", content)
        return "tokenizer_config.json", "auto_map"
    if kind == "adapter":
        name = random.choice(["someone/model", str(base), "../x"])
        content = {"peft_type": "LORA", "base_model_name_or_path": name, "r": 4, "target_modules": ["c_attn"]}
        (base / "adapter_config.json").write_text(json.dumps(content))
        return "adapter_config.json", f"an adapter of {name} in the base's folder"
    if kind in ("bin", "bin alone"):
        (base / "pytorch_model.bin").write_bytes(spoiling.bomb(marker))
        if kind == "bin alone":
            for path in base.glob("model*"):
                path.unlink()
        return "pytorch_model.bin", kind
    if kind == "index":
        for path in base.glob("model*"):
            path.unlink()
        target = random.choice(["../marker.safetensors", "/etc/hostname", "x.bin", "\x1b[2J.safetensors"])
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": target}}))
        if target == "x.bin":
            (base / "x.bin").write_bytes(spoiling.bomb(marker))
        return "model.safetensors.index.json", f"names {target!r}"
    content = json.loads((base / "config.json").read_text())
    key = random.choice(
        ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"]
    )
    spoiling.changed(base / "config.json", content | {key: "kernels-community/flash-attn3"})
    return "config.json", f"{key} of a hub kernel"


KINDS = (
    kind("damaged-bases", "A damaged or hostile base is refused by name, and never trained on in silence.", 1000, make),
)
