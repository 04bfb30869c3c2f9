from __future__ import annotations

from tests.support.sharp import model, tokenizer

__all__ = ["model", "tokenizer"]
