"""Undamaged folders: bases, runs, comparisons, deltas and rows, small ones, each made once.

A scene is a folder in which commands run with relative paths: copied elsewhere it does the same. What is made with
torch is made in a process of the fork server.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.child import Case, Outcome
from tests.faults.kinds import Place

BASE, ROWS, CHATS = "strangers-base", "rows.jsonl", "chats.jsonl"
FINISHED, UNFINISHED = "finished-run", "unfinished-run"
COMPARED, UNCOMPARED = "finished-comparison", "unfinished-comparison"
CPU = ("--device", "cpu")
STEPS = ("--set", "max_steps=4", "--set", "save_steps=1", "--set", "eval_steps=2", "--set", "learning_rate=0.01",
         "--set", "max_length=40", "--set", "per_device_train_batch_size=4")  # fmt: skip
LORA = ("--set", "lora_dropout=0.1", "--set", "r=4")
QUICK = ("--set", "max_steps=2", "--set", "max_length=40", "--set", "per_device_train_batch_size=4")
#: the bases that scenes are made of
BASES = ("gpt2", "llama", "qwen3", "slow", "tiny")


def made(place: Place, case: Case, codes: tuple[int, ...] = (0,)) -> Outcome:
    outcome = place.forks.run(case)
    assert outcome.rc in codes, f"{case.argv or case.call}: {outcome}"
    return outcome


def scene(place: Place, base: str) -> Path:
    """A base, rows and chats."""

    def make(folder: Path) -> None:
        made(place, Case(call="tests.faults.scenes:make_base", given={"kind": base}, cwd=folder))
        names, towns = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gil", "Hal"] * 2, ["Leeds", "York"] * 8
        pairs = [
            (f"name: {name} | town: {town}\n", f"{name} lives in {town}.")
            for name, town in zip(names, towns, strict=True)
        ]
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        chats = [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
            for prompt, answer in pairs
        ]
        for name, content in ((ROWS, rows), (CHATS, chats)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))

    return place.once(f"scene-{base}", make)


def with_runs(place: Place, base: str, method: str = "lora") -> Path:
    """The scene with a finished run of a method, and one that was interrupted after its second step."""

    def make(folder: Path) -> None:
        copied(scene(place, base), folder)
        settings = (*STEPS, *(LORA if method == "lora" else ()))
        train = ("train", "--model", BASE, "--data", ROWS, "--method", method, *settings, *CPU)
        made(place, Case((*train, "--output-dir", FINISHED), cwd=folder))
        stop = ("tests.faults.scenes:interrupt_when", {"pattern": f"{UNFINISHED}/checkpoint-2"})
        made(place, Case((*train, "--output-dir", UNFINISHED), cwd=folder, faults=(stop,)), codes=(130,))

    return place.once(f"runs-{base}-{method}", make)


def with_comparisons(place: Place) -> Path:
    """A scene with a finished comparison, and one that was interrupted after its first final run."""

    def make(folder: Path) -> None:
        copied(scene(place, "gpt2"), folder)
        made(place, Case((*COMPARE, "--output-dir", COMPARED), cwd=folder))
        stop = ("tests.faults.scenes:interrupt_when", {"pattern": f"{UNCOMPARED}/runs/lora/*/result.json"})
        made(place, Case((*COMPARE, "--output-dir", UNCOMPARED), cwd=folder, faults=(stop,)), codes=(130,))

    return place.once("comparisons", make)


COMPARE = ("compare", "--quick", "--model", BASE, "--data", ROWS, "--methods", "lora,bitfit", *QUICK, *CPU)


def copied(scene: Path, folder: Path, most: int = 2**20) -> Path:
    """A copy of a scene. Large files are links to the same bytes: who damages one takes it away first."""

    def copy(source: str, target: str) -> None:
        if os.stat(source).st_size > most and not os.path.exists(target):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    shutil.copytree(scene, folder, symlinks=True, copy_function=copy, dirs_exist_ok=True)
    return folder


# -- inside of the fork server's processes ---------------------------------------------------------------------------


def interrupt_when(pattern: str) -> None:
    """Ctrl-C as soon as a file or folder of that name is in its place, however it came there."""
    state = {"busy": False, "fired": False}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if state["busy"] or state["fired"] or not (event == "open" or event.startswith("os.")):
            return
        state["busy"] = True
        state["fired"] = bool(glob.glob(pattern))
        state["busy"] = False
        if state["fired"]:
            signal.raise_signal(signal.SIGINT)

    sys.addaudithook(hook)


def make_base(kind: str) -> None:
    """A base with random weights and a tokenizer of its own, in `strangers-base`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from spectune import embedded
    from tests.support import make_model, make_tokenizer

    folder = Path(BASE)
    if kind == "tiny":
        shutil.copytree(embedded.MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
        return
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True)),
    }
    model = makers.get(kind, make_model)()
    model.save_pretrained(folder, max_shard_size="30KB" if kind == "llama" else "50GB")
    tokenizer = make_tokenizer(bos=kind == "llama", chat=True)
    tokenizer.save_pretrained(folder)
    if kind == "slow":
        core = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(core["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in core["merges"]))
        (folder / "tokenizer.json").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
