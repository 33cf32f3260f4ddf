"""The page itself, and what pages of measurements share: colours, tables, legends, notes."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from mmpeft_fast.pages.svg import css_name

_LIGHT = ("#4269d0", "#97bbf5", "#9aa3af", "#a463f2", "#0f766e", "#c2571a", "#d9a441", "#aa3355", "#6cc5b0", "#9c6b4e")
_DARK = ("#6f92f0", "#4f6f9f", "#6b7480", "#b98af5", "#2dbdb0", "#f0864a", "#e0bb62", "#e06c8d", "#3f8f7f", "#b98b6e")


def page(title: str, sections: Sequence[str], *, style: str = "", script: str = "") -> str:
    """The page; `style` comes behind the shared style sheet and the palette, `script` behind everything."""
    end = f"<script>\n{script}</script>\n" if script else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>\n{_shared_style()}{style}</style>\n</head>\n<body>\n<main>",
            *sections,
            f"</main>\n{end}</body>\n</html>\n",
        ]
    )


def _shared_style() -> str:
    def variables(palette: Sequence[str]) -> str:
        return "".join(f"--c{i}: {colour}; " for i, colour in enumerate(palette))

    return (
        f"{page_file('style.css')}:root {{ {variables(_LIGHT)}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(_DARK)}}} }}\n"
    )


def page_file(name: str) -> str:
    """A style sheet or script that the package ships."""
    return resources.files("mmpeft_fast.pages").joinpath(name).read_text(encoding="utf-8")


def fills(colours: Mapping[str, str]) -> str:
    """Rules that give shapes and legends their colour, by the name of what they stand for."""
    return "".join(
        f"svg .{css_name(name)} {{ fill: {colour}; }} .legend .{css_name(name)}::before {{ background: {colour}; }}\n"
        for name, colour in colours.items()
    )


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]], *, has_total: bool = False) -> str:
    """The first column is text, the others numbers; the last row may be their total."""
    body = [_row("td", [escape(text) for text in row]) for row in rows]
    if has_total and body:
        body[-1] = body[-1].replace("<tr>", "<tr class=total>", 1)
    return _table("", header, body)


def heat_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Names and numbers 0 to 100, darker where they are higher; None: no number."""

    def number(value: float | None) -> str:
        return "–" if value is None else f'<span class=heat style="--heat: {value:.0f}%">{value:.1f}</span>'

    body = [_row("td", [escape(name), *map(number, values)]) for name, values in rows]
    return _table(" class=heats", header, body)


def _table(name: str, header: Sequence[str], rows: Sequence[str]) -> str:
    head = _row("th", [escape(text) for text in header])
    return f"<div class=scroll><table{name}><thead>{head}</thead>\n<tbody>{''.join(rows)}</tbody></table></div>"


def _row(kind: str, contents: Sequence[str]) -> str:
    """Of cells whose contents are HTML; all but the first are numbers."""
    inside = "".join(f"<{kind}{' class=number' if i else ''}>{each}</{kind}>" for i, each in enumerate(contents))
    return f"<tr>{inside}</tr>"


def legend(names: Sequence[str]) -> str:
    return f"<p class=legend>{''.join(f'<span class={css_name(name)}>{escape(name)}</span>' for name in names)}</p>"


def notes(terms: Sequence[tuple[str, str]]) -> str:
    """What the page's words mean."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in terms)
    return f"<section>\n<h2>What the numbers mean</h2>\n<dl class=notes>\n{items}</dl>\n</section>"
