"""Answers as OpenAI's interface has them: whole, and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectune.serving.orders import Piece, Score
from spectune.serving.wanted import Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenNames:
    """Tokens as texts and bytes, for likelihoods."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from spectune.data.token_places import TokenBytes

        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._bytes = None if backend is None else TokenBytes.of(backend)

    def text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        exact = b"" if self._bytes is None else self._bytes[token]
        return {"token": text, "logprob": _finite(logprob), "bytes": list(exact or text.encode())}


@dataclass
class Answer:
    """What one request is answered with.

    Attributes:
        prompt_tokens: known before the first piece.
    """

    wanted: Wanted
    names: TokenNames
    prompt_tokens: int
    completion_tokens: int = 0
    id: str = field(default="", init=False)
    created: int = field(default_factory=lambda: int(time.time()), init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.wanted.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def first_events(self) -> list[dict[str, Any]]:
        """What a stream begins with: whose turn it is, of a chat."""
        if not self.wanted.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([_chat_choice(i, delta, None, None)]) for i in range(self.wanted.choices)]

    def event(self, piece: Piece) -> dict[str, Any] | None:
        """A piece as a stream has it; None where there is nothing to tell."""
        self.completion_tokens += piece.tokens
        if not (piece.text or piece.scores or piece.last):
            return None
        if self.wanted.chat:
            delta = {"content": piece.text} if piece.text or not piece.last else {}
            return self._chunk([_chat_choice(piece.choice, delta, self._chat_scores(piece.scores), piece.finished)])
        scores = self._text_scores(piece.scores)
        return self._chunk([_text_choice(piece.choice, piece.text, scores, piece.finished)])

    def last_events(self) -> list[dict[str, Any]]:
        """What a stream ends with: the usage, where it was asked for."""
        return [self._chunk([]) | {"usage": self.usage()}] if self.wanted.include_usage else []

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All choices at once."""
        self.completion_tokens = sum(piece.tokens for piece in pieces)
        choices = [self._whole_choice(i, [p for p in pieces if p.choice == i]) for i in range(self.wanted.choices)]
        kind = "chat.completion" if self.wanted.chat else "text_completion"
        return self._frame(kind) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt, written = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _whole_choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text, scores = "".join(piece.text for piece in pieces), [score for piece in pieces for score in piece.scores]
        finished = next((piece.finished for piece in reversed(pieces) if piece.finished), None)
        if not self.wanted.chat:
            return _text_choice(number, text, self._text_scores(scores), finished)
        message = {"role": "assistant", "content": text, "refusal": None}
        found = _chat_choice(number, message, self._chat_scores(scores), finished)
        return {"message" if key == "delta" else key: value for key, value in found.items()}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        found = self._frame("chat.completion.chunk" if self.wanted.chat else "text_completion") | {"choices": choices}
        return found | {"usage": None} if self.wanted.include_usage else found

    def _chat_scores(self, scores: Sequence[Score]) -> dict[str, Any] | None:
        if self.wanted.logprobs is None:
            return None
        return {"content": [self._chat_score(score) for score in scores], "refusal": None}

    def _chat_score(self, score: Score) -> dict[str, Any]:
        top = [self.names.named(token, logprob) for token, logprob in score.top[: self.wanted.logprobs]]
        return self.names.named(score.token, score.logprob) | {"top_logprobs": top}

    def _text_scores(self, scores: Sequence[Score]) -> dict[str, Any] | None:
        if self.wanted.logprobs is None:
            return None
        top = [
            {self.names.text(token): _finite(logprob) for token, logprob in score.top[: self.wanted.logprobs]}
            for score in scores
        ]
        return {
            "tokens": [self.names.text(score.token) for score in scores],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": top if self.wanted.logprobs else None, "text_offset": [score.start for score in scores],
        }  # fmt: skip


def _chat_choice(number: int, delta: dict[str, Any], scores: Any, finished: str | None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": scores, "finish_reason": finished}


def _text_choice(number: int, text: str, scores: Any, finished: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": scores, "finish_reason": finished}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's servers write -9999 for what is all but impossible."""
    return logprob if logprob > -9999.0 else -9999.0
