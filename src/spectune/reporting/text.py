"""Text of users and models, made fit to be shown: it is not trusted with more than to be read."""

import unicodedata


def plain(text: str) -> str:
    """Without control characters, which a terminal would obey and XML forbids, and without halves of surrogate pairs,
    which no file can hold; line breaks and tabs stay."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def one_line(text: str) -> str:
    return " ".join(plain(text).split())


def clipped(text: str, most: int) -> str:
    """At most so many characters, with the number of all of them where some are left out."""
    text = plain(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"
