"""The drawings of the method pages: one transformer block, what is trained in orange.

python docs/methods/draw.py          # writes docs/methods/img/*.svg
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FROZEN, TRAINED, EDGE, INK = "#e8edf2", "#f6a04d", "#5b6773", "#1d252c"
WIDTH, HEIGHT = 560, 430


class Drawing:
    """A canvas on which later boxes lie over earlier ones."""

    def __init__(self, title: str, description: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{EDGE}"/></marker></defs>',
        ]

    def box(self, x: int, y: int, w: int, h: int, text: str, *, trained: bool = False, small: bool = False) -> None:
        fill = TRAINED if trained else FROZEN
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{EDGE}" stroke-width="1.2"/>'
        )
        size = ' font-size="11"' if small else ""
        lines = text.split("\n")
        first = y + h / 2 + 4.5 - 7.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.parts.append(
                f'<text x="{x + w / 2}" y="{first + 15 * i}" text-anchor="middle" fill="{INK}"{size}>'
                f"{escape(line)}</text>"
            )

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(points))
        self.parts.append(f'<path d="{path}" fill="none" stroke="{EDGE}" stroke-width="1.4" marker-end="url(#tip)"/>')

    def plus(self, x: int, y: int) -> None:
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="9" fill="#ffffff" stroke="{EDGE}" stroke-width="1.3"/>')
        self.parts.append(f'<path d="M{x - 5} {y} H{x + 5} M{x} {y - 5} V{y + 5}" stroke="{EDGE}" stroke-width="1.3"/>')

    def note(self, x: int, y: int, text: str) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" fill="{INK}" font-size="11.5">{escape(text)}</text>')

    def text(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def block(title: str, description: str, *, everything: bool = False, sub: dict[str, bool] | None = None) -> Drawing:
    """The block from the bottom (input) to the top (output), residual stream at x = 150."""
    trained = sub or {}
    d = Drawing(title, description)
    d.arrow((150, 395), (150, 231))
    d.arrow((150, 213), (150, 61))
    d.arrow((150, 43), (150, 14))
    d.arrow((150, 375), (225, 375), (225, 359))
    d.arrow((225, 335), (225, 311))
    d.arrow((225, 275), (225, 222), (159, 222))
    d.arrow((150, 200), (225, 200), (225, 184))
    d.arrow((225, 160), (225, 136))
    d.arrow((225, 100), (225, 52), (159, 52))
    d.box(165, 335, 120, 24, "layer norm", trained=everything or trained.get("norm", False), small=True)
    d.box(165, 275, 120, 36, "attention", trained=everything)
    d.box(165, 160, 120, 24, "layer norm", trained=everything or trained.get("norm", False), small=True)
    d.box(165, 100, 120, 36, "feed-forward", trained=everything)
    d.plus(150, 222)
    d.plus(150, 52)
    d.box(90, 395, 120, 26, "token embeddings", trained=everything, small=True)
    d.note(20, 26, "to the next block")
    d.box(420, 395, 14, 14, "", trained=True)
    d.note(440, 407, "trained")
    d.box(490, 395, 14, 14, "")
    d.note(510, 407, "frozen")
    return d


def full() -> Drawing:
    return block("Full fine-tuning", "Every weight of the block, and the embeddings, is trained.", everything=True)


def adapter() -> Drawing:
    d = block("Bottleneck adapter", "A small residual network after each block; the block itself is frozen.")
    d.box(330, 30, 210, 44, "adapter: h + W_up f(W_down h)", trained=True, small=True)
    d.arrow((330, 44), (160, 33))
    d.note(330, 92, "placement 'block': after each block")
    d.box(330, 106, 100, 24, "'ffn'", trained=True, small=True)
    d.arrow((330, 118), (290, 78), (228, 78))
    d.box(330, 140, 210, 24, "'parallel': beside it, on its input", trained=True, small=True)
    d.arrow((330, 152), (310, 148), (228, 148))
    d.box(330, 240, 210, 24, "'attention+ffn': here and at 'ffn'", trained=True, small=True)
    d.arrow((330, 252), (228, 248))
    return d


def prefix() -> Drawing:
    d = block("Prefix tuning", "Learned keys and values stand before the text's own in the attention of every layer.")
    d.box(340, 255, 90, 30, "P_K", trained=True)
    d.box(430, 255, 110, 30, "K of the text")
    d.box(340, 300, 90, 30, "P_V", trained=True)
    d.box(430, 300, 110, 30, "V of the text")
    d.arrow((340, 293), (287, 293))
    d.note(340, 245, "what this layer's queries attend over")
    d.note(340, 350, "every position sees the whole prefix;")
    d.note(340, 366, "text positions start after it")
    return d


def prompt() -> Drawing:
    d = block("Prompt tuning", "Learned embeddings of virtual tokens stand before the text; the model is frozen.")
    d.box(10, 395, 76, 26, "P_e", trained=True, small=True)
    d.note(10, 388, "virtual tokens")
    d.note(330, 290, "the sequence is [P_e; text] in every layer;")
    d.note(330, 306, "after the last one the virtual positions are")
    d.note(330, 322, "cut off: the head sees text only")
    return d


def lora() -> Drawing:
    d = block("LoRA", "A low-rank product beside each linear map.")
    d.box(330, 250, 110, 86, "W (frozen)\nout x in")
    d.box(460, 306, 60, 30, "A  r x in", trained=True, small=True)
    d.box(460, 250, 60, 30, "B  out x r", trained=True, small=True)
    d.arrow((490, 306), (490, 281))
    d.arrow((385, 366), (385, 337))
    d.arrow((385, 355), (490, 355), (490, 337))
    d.plus(385, 222)
    d.arrow((385, 250), (385, 231))
    d.arrow((490, 250), (490, 222), (394, 222))
    d.note(400, 372, "x")
    d.note(400, 212, "W x + (alpha / r) B A x")
    d.note(330, 130, "at every linear of attention and")
    d.note(330, 146, "feed-forward; the head is left alone")
    return d


def bitfit() -> Drawing:
    d = block("BitFit", "An offset on each bias of linears and norms.", sub={})
    for y, text in ((335, "+ b"), (275, "+ b"), (160, "+ b"), (100, "+ b")):
        d.box(285, y, 44, 24 if y in (335, 160) else 36, text, trained=True, small=True)
    d.note(350, 200, "y = W x + (b + offset)")
    d.note(350, 218, "one vector for each bias; the matrices")
    d.note(350, 234, "and the norms' scales are frozen")
    return d


def dora() -> Drawing:
    d = block("DoRA", "A low-rank change of each weight's direction, and a trained length for each of its rows.")
    d.box(330, 250, 110, 86, "W (frozen)\nout x in")
    d.box(460, 306, 60, 30, "A  r x in", trained=True, small=True)
    d.box(460, 250, 60, 30, "B  out x r", trained=True, small=True)
    d.arrow((490, 306), (490, 281))
    d.arrow((385, 250), (385, 231))
    d.arrow((490, 250), (490, 222), (394, 222))
    d.plus(385, 222)
    d.arrow((385, 213), (385, 191))
    d.box(340, 161, 90, 30, "m / ||.||", trained=True, small=True)
    d.note(440, 181, "m: one an output")
    d.note(330, 120, "at every linear of attention and")
    d.note(330, 136, "feed-forward; the head is left alone")
    return d


def ia3() -> Drawing:
    d = block("IA3", "Learned vectors scale keys, values and the feed-forward's inner features.")
    d.box(340, 255, 90, 30, "l_k", trained=True)
    d.box(430, 255, 110, 30, "x K of the text")
    d.box(340, 300, 90, 30, "l_v", trained=True)
    d.box(430, 300, 110, 30, "x V of the text")
    d.arrow((340, 293), (287, 293))
    d.box(340, 103, 90, 30, "l_ff", trained=True)
    d.box(430, 103, 110, 30, "x f(W1 x)")
    d.arrow((340, 118), (287, 118))
    d.note(340, 160, "after the nonlinearity, before W2")
    return d


def oft() -> Drawing:
    d = block("OFT", "The input of each linear is turned by an orthogonal matrix, block by block.")
    d.box(340, 240, 110, 60, "W (frozen)\nout x in")
    d.box(340, 325, 110, 36, "R  (blocks)", trained=True)
    d.arrow((395, 386), (395, 362))
    d.arrow((395, 325), (395, 301))
    d.arrow((395, 240), (395, 206))
    d.note(405, 384, "x")
    d.note(405, 210, "W R x + b")
    d.note(330, 130, "at every linear of attention and")
    d.note(330, 146, "feed-forward; the head is left alone")
    return d


def miss() -> Drawing:
    d = block("MiSS", "The sum of the input's shards goes through one small matrix beside each frozen linear.")
    d.box(330, 250, 110, 86, "W (frozen)\nout x in")
    d.box(458, 306, 84, 30, "x1 + x2 + ...", small=True)
    d.box(458, 250, 84, 30, "D  r x out", trained=True, small=True)
    d.arrow((500, 306), (500, 281))
    d.arrow((385, 366), (385, 337))
    d.arrow((385, 355), (500, 355), (500, 337))
    d.plus(385, 222)
    d.arrow((385, 250), (385, 231))
    d.arrow((500, 250), (500, 222), (394, 222))
    d.note(400, 372, "x, in shards of r")
    d.note(330, 130, "at every linear of attention and")
    d.note(330, 146, "feed-forward; the head is left alone")
    return d


def ln() -> Drawing:
    d = block("LN tuning", "The norms' own weights are trained; everything else is frozen.", sub={"norm": True})
    d.note(320, 180, "g * (x - mean) / deviation + b")
    d.note(320, 198, "g and b are trained, the final")
    d.note(320, 214, "norm's among them; the matrices")
    d.note(320, 230, "and their biases are frozen")
    return d


def main() -> None:
    folder = Path(__file__).parent / "img"
    folder.mkdir(exist_ok=True)
    for make in (full, adapter, prefix, prompt, lora, bitfit, dora, ia3, oft, miss, ln):
        (folder / f"{make.__name__}.svg").write_text(make().text(), encoding="utf-8")


if __name__ == "__main__":
    main()
