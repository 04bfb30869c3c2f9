"""Words of any script, and texts that are the same but for how Unicode composes them."""

import unicodedata
from collections.abc import Sequence

import regex

#: scripts that put no spaces between words, as inside a regular expression's set
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}\p{Balinese}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Yi}\p{Nushu}\p{Tangut}"
)
#: of the references' letters in such scripts, the share from which words between spaces say nothing
UNSPACED_SHARE = 0.1
_BOUNDARY = regex.compile(r"\b", regex.V1 | regex.WORD)
_LETTER = regex.compile(r"\p{L}")
_UNSPACED_LETTER = regex.compile(rf"[[{_UNSPACED}]&&\p{{L}}]", regex.V1)
_HAN_LETTER = regex.compile(r"[\p{Han}&&\p{L}]", regex.V1)
_GRAPHEME = regex.compile(r"\X")
_VISIBLE = regex.compile(r"[^\s\p{Cc}\p{Cf}]")


def composed(text: str) -> str:
    """The text in Unicode's form NFC, without outer white space."""
    return unicodedata.normalize("NFC", text.strip())


def words(text: str) -> list[str]:
    """The tokens that ROUGE compares: NFC, case folded, cut where Unicode's rules for words cut (UAX 29).

    So a word is a run of letters, marks and digits, with what joins them inside of it (`can't`, `3.14`). In scripts
    without spaces each grapheme cluster is a token, and so is every sign: `C++` is three tokens, `-5` is two, an emoji
    with its skin colour one.
    """
    found: list[str] = []
    for piece in _BOUNDARY.split(composed(composed(text).casefold())):
        if not _VISIBLE.search(piece):
            continue
        # Katakana is joined by those rules; a sign may lead a run of marks
        found += _GRAPHEME.findall(piece) if _UNSPACED_LETTER.search(piece) else [piece]
    return found


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's tokenizer for these references: "13a", its default, or where more than a tenth of their letters are
    in scripts without spaces "zh" (no such script but Chinese) or "char"."""
    text = "\n".join(references)
    unspaced = len(_UNSPACED_LETTER.findall(text))
    if unspaced <= UNSPACED_SHARE * len(_LETTER.findall(text)):
        return "13a"
    return "zh" if unspaced == len(_HAN_LETTER.findall(text)) else "char"
