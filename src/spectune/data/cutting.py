"""What is left of a sequence that is too long."""

from collections.abc import Sequence

from spectune.data.problem import RowProblem

#: what a row that is too long loses
TRUNCATIONS = ("start", "middle", "refuse")

Span = tuple[int, int]


def windows(ids: Sequence[int], longest: int) -> list[Sequence[int]]:
    """Consecutive windows of at most `longest` ids. Each begins with the last id of the one before: a sequence's first
    token is not predicted, so every token of the text but its first has a loss once."""
    return [ids[start : start + longest] for start in range(0, max(len(ids) - 1, 1), longest - 1)]


def cut(
    ids: Sequence[int], learned: Sequence[Span], longest: int, *, lead: int, how: str
) -> tuple[list[int], tuple[Span, ...], list[str]]:
    """At most `longest` ids of a sequence that has more, the stretches of them that are learned, and what was cut:
    "prompt" (the beginning), "middle", "end".

    The last learned stretch is kept whole if there is room for it and for one token to predict it from.

    Args:
        lead: ids at the beginning that stay.
        how: one of TRUNCATIONS.

    Raises:
        RowProblem: it is too long, and is to be refused.
    """
    if how == "refuse":
        raise RowProblem(f"has {len(ids)} tokens, and max_length is {longest}; truncation=start or middle would cut it")
    start, stop = learned[-1]
    before = longest - (stop - start)
    if before < max(lead, 1) and start > 0:  # not even the last answer fits: its end goes, too
        lead = lead if lead < longest else 0
        begin = start if lead else start - 1
        kept = [(0, lead), (begin, begin + longest - lead)]
        lost = [*(["prompt"] if begin > lead else []), "end"]
    elif start == 0:
        kept, lost = [(0, longest)], ["end"]
    else:
        head = lead if how == "start" else max(lead, before // 2)
        kept = [(0, head), (len(ids) - longest + head, len(ids))]
        lost = ["prompt" if how == "start" else "middle"]
    found, at, spans = list[int](), 0, list[Span]()
    for begin, end in kept:
        for a, b in learned:
            # what stands first behind a gap is not learned: it would be predicted from another text than its own
            first = a if a >= begin else begin + 1
            if max(first, begin) < min(b, end):
                spans.append((max(first, begin) - begin + at, min(b, end) - begin + at))
        found += ids[begin:end]
        at += end - begin
    return found, tuple(spans), lost
