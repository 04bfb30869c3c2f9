"""Numbers and names as sentences have them."""

from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def sentence(text: str) -> str:
    """Capital letter first, a full stop last. Names such as "LoRA" stay."""
    return f"{text[:1].upper()}{text[1:]}."


def number_word(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def share(value: float) -> str:
    """A share as per cent with two significant digits: 0.0134 -> 1.3%, 0.123 -> 12%."""
    hundred = 100 * value
    if hundred == 0 or hundred >= 10:
        return f"{hundred:.0f}%"
    return f"{hundred:.1f}%" if hundred >= 0.1 else f"{hundred:.1g}%"


def named(label: str, method: str) -> str:
    """A method's label within a sentence: `Prefix tuning` -> `prefix tuning`, `Adapter` -> `the adapter`; names with
    capitals inside (`LoRA`, `BitFit`, `IA3`) stay."""
    if method == "full" and label == "Full":
        return "full fine-tuning"
    first, _, rest = label.partition(" ")
    if not (first[1:].islower() and first[:1].isupper()):
        return label
    return f"{first.lower()} {rest}" if rest else f"the {first.lower()}"
