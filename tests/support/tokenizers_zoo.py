"""Tokenizers of the three kinds that most models have: byte-level BPE, SentencePiece-like, BERT-like.

Each is trained here on a few sentences, in well under a second, and always comes out the same. `raw_text` reads ids
back without the tokenizer's own decoder, and `comparable` takes from a text what a tokenizer of its kind cannot keep.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import string
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

#: whole words of all of these become tokens, " yes" and "\n\n" among them, so that text merges across seams
CORPUS = [
    "user assistant system tool model User Assistant System yes no maybe the reason is why because he said it",
    "question: answer: was the town of York and the town of Leeds, hello there; what is the time in York ?",
    '{"name": "get_time", "arguments": {"city": "York"}} {"time": "10:15"} tool_call think thinking final analysis',
    "yes\n\nno\n\nmaybe\n\nyes\n\nno\n\nYou are a helpful assistant.\n\nUSER: hi ASSISTANT: yes\n\n",
    "ten it is ten. yes yes yes no no no hi hi hi ho ho ho hi yes ho no hi yes ho no",
] * 6
BYTES = [f"<0x{value:02X}>" for value in range(256)]
KINDS = ("byte_level", "metaspace", "wordpiece")
#: how Qwen's tokenizer cuts text before it merges bytes: signs go together with the letters or line ends behind them,
#: and so does ">" at the end of a prompt with the first "\n" of an answer
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _byte_level() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*CORPUS, *["\n\n", " yes", ">\n", ">\n\n", "]\n", ":\n"] * 40], trainer)
    return raw


@functools.cache
def _metaspace(prepend: str, model: str) -> Tokenizer:
    """As SentencePiece makes them: a space is a part of the word behind it, unknown characters are bytes."""
    raw = Tokenizer(models.BPE() if model == "bpe" else models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=model == "unigram")
    pads = ["<unk>", "<pad>"]
    if model == "bpe":
        trainer: Any = trainers.BpeTrainer(vocab_size=300, special_tokens=pads, show_progress=False)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=pads, unk_token="<unk>", show_progress=False, max_piece_length=8
        )
    # Llama has no "\n" in its vocabulary (it is a byte), Gemma has "\n\n" and longer: one model of each sort
    raw.train_from_iterator(CORPUS if model == "bpe" else (text.replace("\n", " ") for text in CORPUS), trainer)
    learned = json.loads(raw.to_str())["model"]
    # the 256 bytes are ordinary entries of the vocabulary, as in Llama's, not added tokens
    if model == "bpe":
        vocab = dict(learned["vocab"])
        vocab.update({token: len(vocab) + number for number, token in enumerate(BYTES)})
        merges = [tuple(pair) for pair in learned["merges"]]
        found = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    else:
        pieces = [(token, score) for token, score in learned["vocab"]]
        found = Tokenizer(models.Unigram([*pieces, *((token, -30.0) for token in BYTES)], unk_id=0, byte_fallback=True))
    found.pre_tokenizer = raw.pre_tokenizer
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.add_special_tokens(pads)
    return found


@functools.cache
def _wordpiece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(prefix="##")
    alphabet = string.ascii_lowercase + string.digits + string.punctuation
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[PAD]"], initial_alphabet=list(alphabet), show_progress=False
    )
    # every character has to be met inside a word too, else "##x" is missing
    words = [a + b for a in string.ascii_lowercase + string.digits for b in string.ascii_lowercase + string.digits]
    raw.train_from_iterator([*CORPUS, " ".join(words)], trainer)
    return raw


def _ready(
    raw: Tokenizer, pad: str, eos: str, bos: str | None, special: Sequence[str], added: Sequence[str], puts_bos: bool
) -> PreTrainedTokenizerFast:
    raw = copy.deepcopy(raw)
    names = dict.fromkeys(name for name in (bos, eos, *special) if name is not None)
    raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    raw.add_tokens([AddedToken(name, normalized=False, special=False) for name in added])
    if puts_bos and bos is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, raw.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, pad_token=pad, **({} if bos is None else {"bos_token": bos})
    )


def byte_level(
    eos: str = "</s>",
    bos: str | None = None,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    *,
    puts_bos: bool = True,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which " yes" and "\\n\\n" are one token each; nothing of a text is lost.

    Args:
        special: more special tokens.
        added: added tokens that are not special, such as Qwen's `<think>`.
        puts_bos: plain text gets BOS in front, as with Llama, where there is one.
    """
    return _ready(_byte_level(), "<|pad|>", eos, bos, special, added, puts_bos)


def metaspace(
    eos: str = "</s>",
    bos: str | None = None,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    *,
    puts_bos: bool = True,
    prepend: str = "always",
    model: str = "bpe",
) -> PreTrainedTokenizerFast:
    """SentencePiece-like, of `bpe` or `unigram`. With `prepend="always"` a space comes before the text and behind
    each special token, with `"first"` before the text alone."""
    return _ready(_metaspace(prepend, model), "<pad>", eos, bos, special, added, puts_bos)


def wordpiece(
    eos: str = "</s>",
    bos: str | None = None,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    *,
    puts_bos: bool = True,
) -> PreTrainedTokenizerFast:
    """BERT-like: lower case, no accents, white space only as a border between words."""
    return _ready(_wordpiece(), "[PAD]", eos, bos, special, added, puts_bos)


def kind_of(tokenizer: PreTrainedTokenizerFast) -> str:
    name = type(tokenizer.backend_tokenizer.model).__name__
    if name == "WordPiece":
        return "wordpiece"
    return "byte_level" if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel) else "metaspace"


def raw_text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of ids, each token as it is written in the vocabulary: no space is taken away or put in."""
    kind = kind_of(tokenizer)
    if kind == "byte_level":
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    special = set(tokenizer.added_tokens_decoder)
    parts = bytearray()
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if number in special:
            parts += token.encode()
        elif kind == "wordpiece":
            parts += token.removeprefix("##").encode()
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            parts.append(int(token[3:5], 16))
        else:
            parts += token.replace("▁", " ").encode()
    return parts.decode(errors="replace")


def comparable(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """What is left of a text when that is taken away which a tokenizer of this kind can't keep: with byte-level
    nothing, with Metaspace a space in front or behind a special token, with WordPiece white space and case."""
    kind = kind_of(tokenizer)
    if kind == "wordpiece":
        return str(re.sub(r"\s", "", text)).lower()
    if kind == "metaspace":
        names = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        either = "|".join(map(re.escape, names))
        return re.sub(rf"((?:^|{either})(?:\[\[|\]\])*) ", r"\1", text)
    return text
