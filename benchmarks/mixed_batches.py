"""What deltas cost in one batch: a pass of the bare base, of one delta, and of many, forward and with backward.

    PYTHONPATH=src python -m benchmarks.mixed_batches --hidden 64 --layers 32            two CPU cores
    PYTHONPATH=src python -m benchmarks.mixed_batches --hidden 2048 --layers 16 --rows 16 --tokens 256 --out mixed.jsonl

One line of JSON for each case: milliseconds (the fastest of `--repeats`), and times the bare base. On CUDA the base is
bfloat16. "scattered": neighbours are of unlike deltas; "side by side": rows of one delta follow each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectune.deltas import BaseFacts, attach, route
from spectune.methods import IA3, BitFit, BottleneckAdapter, DoRA, LNTuning, LoRA, PrefixTuning

#: seven methods
UNLIKE = (LoRA(r=8), BottleneckAdapter(dropout=0.0), IA3(), BitFit(), LNTuning(), PrefixTuning(), DoRA(r=8))


def built(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    heads = max(4, hidden // 128)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, vocab_size=256,
                         num_attention_heads=heads, num_key_value_heads=heads // 2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return model.cuda().bfloat16() if torch.cuda.is_available() else model


def fastest(function: Callable[[], None], repeats: int) -> float:
    """Milliseconds of the fastest call, after two that warm up."""
    times = []
    for number in range(repeats + 2):
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times += [time.perf_counter() - begin] if number > 1 else []
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("hidden", 64), ("layers", 32), ("rows", 16), ("tokens", 32), ("repeats", 9)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model, facts = built(given.hidden, given.layers), BaseFacts()
    ids = torch.randint(0, 256, (given.rows, given.tokens), device=model.device)
    for number in range(8):
        attach(model, LoRA(r=8), f"lora-{number}", facts=facts)
    for number in range(16):
        attach(model, UNLIKE[number % len(UNLIKE)], f"unlike-{number}", facts=facts)
    cases: dict[str, str | list[str | None] | None] = {
        "bare": None,
        "one LoRA": "lora-0",
        "8 LoRAs, scattered": [f"lora-{row % 8}" for row in range(given.rows)],
        "8 LoRAs, side by side": [f"lora-{row * 8 // given.rows}" for row in range(given.rows)],
        "16 deltas of 7 methods": [f"unlike-{row % 16}" for row in range(given.rows)],
    }
    bare: dict[bool, float] = {}
    for backward in (False, True):
        for name, names in cases.items():
            if backward and names is None:
                continue  # nothing is trained

            def passed(names: Any = names, backward: bool = backward) -> None:
                with torch.set_grad_enabled(backward), route(model, names):
                    logits = model(input_ids=ids, use_cache=False).logits
                if backward:
                    logits.float().square().mean().backward()

            taken = fastest(passed, given.repeats)
            base = bare.setdefault(backward, taken)
            share = "of_one_LoRA" if backward else "of_bare"
            line = {"case": name, "backward": backward, "milliseconds": round(taken, 2), share: round(taken / base, 2)}
            line |= {"device": model.device.type, **{key: size for key, size in vars(given).items() if key != "out"}}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
            if given.out is not None:
                with given.out.open("a") as out:
                    out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
