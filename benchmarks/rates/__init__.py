"""Which learning rate is best, by method and size of base: what the rules in `spectune.methods` are fitted to.

    python -m benchmarks.rates pack --corpus CORPUS --base BASES/gpt2-27m --data DATA/e2e --out FOLDER
    python -m benchmarks.rates pretrain --material FOLDER --shape gpt2-60m --seconds 100 --out results.jsonl
    python -m benchmarks.rates sweep --material FOLDER --bases spectune-tiny,gpt2-27m --seconds 300 --out results.jsonl
    python -m benchmarks.rates page --results results.jsonl     # writes docs/results/rates.md

The bases are the embedded one, gpt2-27m, and two that `pretrain` makes of a corpus: 60M weights of GPT-2's shape and
120M of Llama's. All are then tuned on the same E2E rows with `spectune.train`, as a user would.
"""
