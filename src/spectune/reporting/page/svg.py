"""A figure's SVG made part of the page: its colours follow the page's, its ids stay its own, its text is the page's."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from spectune.reporting.plots.style import COLOURS, GRID, INK, MUTED, PAPER

#: colours of the figures and the variables of style.css that take their place
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{colour: f"--series-{number}" for number, colour in enumerate(COLOURS)},
}


def inline(svg: str, name: str, title: str, description: str) -> Markup:
    """The `<svg>` element of a file that matplotlib wrote, to stand inside HTML.

    Only tags are changed, never text: what a label says stays as it was escaped.
    """
    start = svg.index("<svg")
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", start) + 1 :], flags=re.S)
    # it would hold for the whole page; style.css says it for figures
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.S)
    body = re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), name), body)
    found = re.search(r'viewBox="([^"]+)"', svg[start : svg.index(">", start)])
    assert found is not None, "matplotlib writes a viewBox"
    width = found.group(1).split()[2]
    head = (
        f'<svg viewBox="{found.group(1)}" style="--width: {float(width):.0f}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return Markup(head + re.sub(r"\n\s*", "\n", body).strip())


def _tag(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("xlink:href=", "href=").replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    tag = tag.replace("'DejaVu Sans'", "var(--sans)")
    return re.sub(r"#[0-9a-f]{6}\b", lambda c: _variable(c.group()), tag)


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour
