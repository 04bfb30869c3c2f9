"""A figure's SVG made part of the page: its colours follow the page's, its ids stay its own, its text is the page's."""

import re

from markupsafe import Markup, escape

from spectune.files.plain_text import one_line
from spectune.reporting.plots.style import COLOURS, GRID, INK, MUTED, PAPER, Plot

#: colours of the figures and the variables of style.css that take their place
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(COLOURS)}


def inline(svg: str, plot: Plot) -> Markup:
    """The `<svg>` element of a plot's file that matplotlib wrote, to stand inside HTML.

    Only tags are changed, never text: what a label says stays as it was escaped.
    """
    name, start = plot.name, svg.index("<svg")
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", start) + 1 :], flags=re.S)
    # it would hold for the whole page; style.css says it for figures
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.S)
    body = re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), name), body)
    found = re.search(r'viewBox="([^"]+)"', svg[start : svg.index(">", start)])
    assert found is not None, "matplotlib writes a viewBox"
    head = (
        f'<svg viewBox="{found.group(1)}" style="--width: {float(found.group(1).split()[2]):.0f}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(one_line(plot.title))}</title>'
        f'<desc id="{name}-desc">{escape(one_line(plot.description))}</desc>'
    )
    return Markup(head + re.sub(r"\n\s*", "\n", body).strip())


def _tag(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("xlink:href=", "href=").replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    tag = tag.replace("'DejaVu Sans'", "var(--sans)")
    return re.sub(rf"({'|'.join(VARIABLES)})\b", lambda colour: f"var({VARIABLES[colour.group()]})", tag)
