"""Tiny tokenizers of the three common kinds, each with BOS and EOS of its own or not, and chat templates in the manner
of known families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

#: each character at the beginning of a word and inside of one, so that WordPiece knows all of them
CHARACTERS = [f"{character} a{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789:.,<>|/_-?"]
TEXTS = [
    *("the quick brown fox jumps over the lazy dog", "yes no maybe the answer is here", "user assistant system think"),
    *("was it a café or a river, who knows 10 12", "é à ü ñ हिन्दी की ไทย 東京 naïve Leeds York", *CHARACTERS),
] * 3


def byte_level(eos: str = "<|endoftext|>", special: Sequence[str] = (), plain: Sequence[str] = ()) -> Any:
    """Byte-level BPE without BOS; `special` and `plain` are tokens added to it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return _finished(core, eos, special, plain)


def metaspace(eos: str = "</s>", special: Sequence[str] = (), plain: Sequence[str] = ()) -> Any:
    """BPE with Metaspace, bytes for what it does not know, and BOS in front, as Llama 2's."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False))
    tokenizer = _finished(core, eos, special, plain, bos_token="<s>", unk_token="<unk>")
    front = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = front
    return tokenizer


def wordpiece(eos: str = "[SEP]", special: Sequence[str] = (), plain: Sequence[str] = ()) -> Any:
    """WordPiece that lower-cases and takes accents off, as BERT's uncased one."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return _finished(core, eos, special, plain, unk_token="[UNK]")


def _finished(core: Tokenizer, eos: str, special: Sequence[str], plain: Sequence[str], **more: str) -> Any:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (eos, *special)])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain if token != eos])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=eos, **more)


#: <|im_start|>role\n ... <|im_end|>\n, as Qwen's, SmolLM's, and many others
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + (m.tool_calls | tojson "
    "if m.tool_calls else '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: the same, with an empty block of thoughts before each answer, which the generation prompt does not have
EMPTY_THOUGHTS = CHATML.replace(
    "'\n' + (m.content", "'\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + (m.content"
)
#: a line before each answer
HEADER = CHATML.replace("'\n' + (m.content", "'\n' + ('to all: ' if m.role == 'assistant' else '') + (m.content")
#: the generation prompt opens the thoughts; those of earlier turns are cut
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}").replace(
    "(m.content or '')", "(m.content if loop.last or m.role == 'user' else m.content.split('</think>\n')[-1])"
)
