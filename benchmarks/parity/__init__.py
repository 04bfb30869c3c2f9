"""Losses and gradients of the fast paths against those of a plain loop, on a real base and real rows.

    PYTHONPATH=src python -m benchmarks.parity --base BASES/gpt2-27m --data DATA/e2e --out parity.jsonl --workers 6
    PYTHONPATH=src python -m benchmarks.parity --out parity.jsonl --table docs/results/parity.md
    PYTHONPATH=src python -m benchmarks.parity --base ... --data ... --out tiny.jsonl --steps 5 --device cpu   a check

The plain loop (`plain.py`) calls the transformers model with the delta attached, takes torch's cross entropy of all its
logits, and steps with `torch.optim.AdamW`. A fast path is a run of `spectune.train` with some settings (`paths.py`,
with the tolerances and why they are what they are), on the same rows in the same order from the same weights.

Such a run has two stretches (`fast.py`). In the first steps it does not move: before each of them it is given weights
that the plain loop passed through, and loss and gradient are held against those of the plain loop in float64 at the
same weights. There no difference can grow. Then it trains freely for `--steps` steps from the first weights, and its
losses are held against the plain loop's; how far rounding alone makes two such runs part is measured beside it, by
plain runs that attend with another kernel (`plain-attention`) or begin one unit of the last place away
(`plain-last-bit`).

Two processes a method; --workers of all share the GPU, so steps/s are a side note. One JSON line for each run, written
at once; what --out has is not run again, what failed there is. --budget-seconds starts no new run after so many.
"""
