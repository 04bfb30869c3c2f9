"""The server's figures: many deltas beside the bare base, a cold delta beside a warm one, the time to the first answer.

    PYTHONPATH=src python -m benchmarks.serving --base BASES/gpt2-27m --out serving.json
    PYTHONPATH=src python -m benchmarks.serving --base llama-8b --device cuda --out serving.json     random weights

`--base` is a folder, a hub id, spectune-tiny, or a shape by name (SHAPES) with random weights. Each request is made
by a client of its own over HTTP, all at once:

- mixed: 64 requests over 16 deltas of seven methods; bare: the same for the base alone; each after a round that does
  not count, the median of three. Errors, and answers that differ from the same request asked alone (greedy).
- cold: the first token of a delta that no request has named yet, and of one that is attached, one request at a time.
- start: `spectune serve` on the embedded base, from the process's start to the first answer of /health and of a
  completion.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REQUESTS, DELTAS = 64, 16
#: a shape's config, for bases that are made here
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "llama-tiny-32": {
        "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def methods() -> list[Any]:
    from spectune.methods import IA3, BitFit, BottleneckAdapter, DoRA, LoRA, PrefixTuning, PromptTuning

    return [
        LoRA(r=16, lora_alpha=32), DoRA(r=8, lora_alpha=16), BottleneckAdapter(bottleneck_dim=32), BitFit(), IA3(),
        PrefixTuning(num_virtual_tokens=10), PromptTuning(num_virtual_tokens=10), LoRA(r=4, lora_alpha=8),
    ]  # fmt: skip


def loaded_base(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from spectune import embedded
    from spectune.storage import load

    if name not in SHAPES:
        return load(name, device=device, dtype=dtype)
    torch.manual_seed(0)
    kind = torch.float32 if dtype == "auto" and device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[name], pad_token_id=0), dtype=kind).eval()
    return model, AutoTokenizer.from_pretrained(embedded.MODEL_FOLDER)


def write_deltas(model: Any, folder: Path, count: int) -> list[str]:
    """Deltas of all methods in turn, moved so that each does something."""
    import torch

    from spectune.deltas import attach, detach
    from spectune.errors import ConfigError

    names, kinds = [], methods()
    for number in range(count):
        for kind in kinds[number % len(kinds) :] + kinds:  # BitFit needs biases: the next method where there are none
            with contextlib.suppress(ConfigError):
                delta = attach(model, kind, "made", seed=number)
                break
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in delta.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.add_(noise.to(parameter.device, parameter.dtype))
        names.append(f"{number:02}-{delta.method.name}")
        delta.save(folder / names[-1])
        detach(model, "made")
    return names


@contextlib.contextmanager
def server(load: Callable[[], Any], base: str, deltas: Path) -> Iterator[int]:
    from spectune.serving.catalogue import Catalogue
    from spectune.serving.server import Serving, listen, serve

    listening, stops = listen("127.0.0.1", 0), list[Callable[[], None]]()
    port = int(listening.getsockname()[1])
    thread = threading.Thread(
        target=serve, args=(Serving(load, Catalogue(base, deltas), started=stops.append), listening)
    )
    thread.start()
    while not stops or ask(port, "/health")[0] != 200:
        time.sleep(0.01)
    try:
        yield port
    finally:
        stops[0]()
        thread.join()


def ask(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


async def streamed(port: int, body: Any) -> tuple[str, float, float]:
    """Text, seconds to the first token, and to the last."""
    begin, first, text = time.perf_counter(), 0.0, ""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body | {"stream": True}).encode()
    kind = "host: localhost\r\nconnection: close\r\ncontent-type: application/json"
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{kind}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    ended = False
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            ended = True
        elif line.startswith(b"data: "):
            first = first or time.perf_counter() - begin
            event = json.loads(line[6:])
            text += event["choices"][0]["text"] if "choices" in event else "\0"
    writer.close()
    return (text if ended else "\0"), first, time.perf_counter() - begin


def body_for(name: str, number: int, new: int, prompt: int) -> dict[str, Any]:
    ids = [(7 * number + 13 * place) % 5000 + 5 for place in range(prompt)]
    return {"model": name, "prompt": ids, "max_tokens": new, "temperature": 0}


def together(
    port: int, names: list[str], new: int, prompt: int, times: int = 3, *, compared: bool = True
) -> dict[str, Any]:  # fmt: skip
    """So many requests at once: tokens a second, times, errors."""
    bodies = [body_for(names[i % len(names)], i, new, prompt) for i in range(REQUESTS)]

    async def all_of_them() -> list[tuple[str, float, float]]:
        return list(await asyncio.gather(*(streamed(port, body) for body in bodies)))

    rates, rounds = [], []
    for turn in range(times + 1):
        before, begin = written(port), time.perf_counter()
        answers = asyncio.run(all_of_them())
        took, tokens = time.perf_counter() - begin, written(port) - before
        if turn:
            rates.append(tokens / took)
            rounds.append(answers)
    alone = [ask(port, "/v1/completions", body)[1]["choices"][0]["text"] for body in bodies if compared]
    return {
        "tokens_per_second": statistics.median(rates), "rounds": rates,
        "first_token_seconds_median": statistics.median(first for _, first, _ in rounds[-1]),
        "errors": sum("\0" in text for answers in rounds for text, *_ in answers),
        "unlike_alone": sum(
            text != solo for answers in rounds for (text, *_), solo in zip(answers, alone, strict=False)
        ) if compared else None,
    }  # fmt: skip


def written(port: int) -> float:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('spectune_tokens_total{kind="completion"'))


def cold_and_warm(port: int, names: list[str], prompt: int) -> dict[str, Any]:
    """Milliseconds to the first token of deltas that nobody asked for before, and of the same again."""

    def firsts() -> list[float]:
        return [1000 * asyncio.run(streamed(port, body_for(name, 1, 2, prompt)))[1] for name in names]

    cold, warm = firsts(), min((firsts() for _ in range(3)), key=statistics.median)
    later = [a - b for a, b in zip(cold, warm, strict=True)]
    return {
        "cold_ms": dict(zip(names, cold, strict=True)), "warm_ms_median": statistics.median(warm),
        "later_ms_median": statistics.median(later), "later_ms_most": max(later),
    }  # fmt: skip


def start() -> dict[str, float]:
    """Seconds from the command to its first answers, on the embedded base."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    begin = time.perf_counter()
    words = [
        sys.executable,
        "-m",
        "spectune",
        "serve",
        "--model",
        "spectune-tiny",
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=os.environ) as process:
        while True:
            with contextlib.suppress(OSError):
                ask(port, "/health")
                break
            time.sleep(0.005)
        health = time.perf_counter() - begin
        status, _ = ask(port, "/v1/completions", {"model": "spectune-tiny", "prompt": "name:", "max_tokens": 8})
        found = {"health_seconds": health, "completion_seconds": time.perf_counter() - begin, "status": status}
        process.send_signal(signal.SIGTERM)
        found["exit_code"] = process.wait(60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="spectune-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--skip-start", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch

    from spectune.cli.base_and_deltas import one_of_each_method
    from spectune.serving.catalogue import Catalogue
    from spectune.serving.loaded import Loaded
    from spectune.storage import Bank

    found: dict[str, Any] = {"base": args.base, "rows": args.rows, "threads": torch.get_num_threads(), **_sizes(args)}
    memory, names = "2GiB" if args.device == "cpu" else "32GiB", list[str]()
    made: dict[str, Any] = {}

    def load() -> Loaded:
        # all of it in the server's own thread, as `spectune serve` has it: two threads with two OpenMP threads each on
        # two cores wait for each other at every small product (a step took 38 ms in place of 24)
        model, tokenizer = loaded_base(args.base, args.device, args.dtype)
        names.extend(write_deltas(model, folder, DELTAS))
        catalogue = Catalogue("base", folder)
        warm = one_of_each_method(catalogue) if args.device == "cuda" and not args.no_warm_up else None
        # rounding of products differs with the number of rows, and in 16 bits so does the likeliest token
        made.update(at=time.perf_counter(), exact=model.dtype == torch.float32)
        return Loaded.of(model, tokenizer, Bank(model, device_memory=memory), args.rows, warm)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with server(load, "base", folder) as port:
            found["ready_seconds"] = time.perf_counter() - made["at"]
            ask(port, "/v1/completions", body_for("base", 0, 4, args.prompt))
            found["cold"] = cold_and_warm(port, names, args.prompt)
            found["bare"] = together(port, ["base"], args.new, args.prompt, compared=made["exact"])
            found["mixed"] = together(port, names, args.new, args.prompt, compared=made["exact"])
    found["mixed_over_bare"] = found["mixed"]["tokens_per_second"] / found["bare"]["tokens_per_second"]
    if not args.skip_start:
        found["start"] = min((start() for _ in range(3)), key=lambda one: one["completion_seconds"])
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    return {"prompt_tokens": args.prompt, "new_tokens": args.new, "requests": REQUESTS, "deltas": DELTAS}


if __name__ == "__main__":
    main()
