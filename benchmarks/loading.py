"""What looking at a base costs: the time to load one, and of that the checks (headers against an empty model, numbers).

python -m benchmarks.loading --out loading.json                      # Llama of 1 GB, on the CPU
python -m benchmarks.loading --layers 32 --hidden 4096 --device cuda --out loading.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spectune import embedded
from spectune.objectives import CAUSAL_LM
from spectune.storage import load, load_config
from spectune.storage.accounting import Account, check_numbers
from spectune.storage.base_files import read_weights


def timed(work: Callable[[], Any], device: str, times: int = 3) -> float:
    """Seconds, the least of a few."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        config = LlamaConfig(
            hidden_size=args.hidden, intermediate_size=args.hidden * 7 // 2, num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 128, num_key_value_heads=args.hidden // 512, vocab_size=128256,
        )  # fmt: skip
        with torch.device(args.device):
            LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(place)
        AutoTokenizer.from_pretrained(embedded.MODEL_FOLDER).save_pretrained(place)
        weights = read_weights(place, {})

        def account() -> None:
            empty = CAUSAL_LM.empty_model(load_config(place))
            Account(place, read_weights(place, {}), False, False, 0).check_headers(empty)

        total = timed(lambda: load(place, device=args.device, dtype="bfloat16"), args.device)
        model, _ = load(place, device=args.device, dtype="bfloat16")
        found = {
            "device": args.device, "bytes": weights.nbytes, "load_seconds": total,
            "headers_seconds": timed(account, args.device),
            "numbers_seconds": timed(lambda: check_numbers(place, model), args.device),
        }  # fmt: skip
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
