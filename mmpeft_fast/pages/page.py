"""The page itself, and what pages of measurements share: colours, tables, legends, notes."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from mmpeft_fast.pages.svg import css_name

_LIGHT = ("#4269d0", "#97bbf5", "#9aa3af", "#a463f2", "#0f766e", "#c2571a", "#d9a441", "#aa3355", "#6cc5b0", "#9c6b4e")
_DARK = ("#6f92f0", "#4f6f9f", "#6b7480", "#b98af5", "#2dbdb0", "#f0864a", "#e0bb62", "#e06c8d", "#3f8f7f", "#b98b6e")


def page(title: str, style: str, sections: Sequence[str]) -> str:
    """The page; `style` comes behind the shared style sheet and the palette."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>\n{_shared_style()}{style}</style>\n</head>\n<body>\n<main>",
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _shared_style() -> str:
    shared = resources.files("mmpeft_fast.pages").joinpath("style.css").read_text(encoding="utf-8")

    def variables(palette: Sequence[str]) -> str:
        return "".join(f"--c{i}: {colour}; " for i, colour in enumerate(palette))

    return (
        f"{shared}:root {{ {variables(_LIGHT)}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(_DARK)}}} }}\n"
        ".figures div { flex-basis: 140px; }\n"
        ".legend { flex-wrap: wrap; row-gap: 4px; }\n.scroll { margin-bottom: 12px; }\n"
        "svg text.tick { fill: var(--soft); }\n"
        "td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }\n"
        "tr.total td { border-top: 1px solid var(--rule); font-weight: 600; }\n"
    )


def fills(colours: Mapping[str, str]) -> str:
    """Rules that give shapes and legends their colour, by the name of what they stand for."""
    return "".join(
        f"svg .{css_name(name)} {{ fill: {colour}; }} .legend .{css_name(name)}::before {{ background: {colour}; }}\n"
        for name, colour in colours.items()
    )


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]], *, has_total: bool = False) -> str:
    """The first column is text, the others numbers."""

    def line(kind: str, texts: Sequence[str], name: str = "") -> str:
        inside = "".join(
            f"<{kind}{' class=number' if i else ''}>{escape(text)}</{kind}>" for i, text in enumerate(texts)
        )
        return f"<tr{name}>{inside}</tr>"

    body = [line("td", row, " class=total" if has_total and row is rows[-1] else "") for row in rows]
    return f"<div class=scroll><table><thead>{line('th', header)}</thead>\n<tbody>{''.join(body)}</tbody></table></div>"


def heat_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Names and numbers 0 to 100, darker where they are higher; None: no number."""

    def cell(value: float | None) -> str:
        if value is None:
            return "<td class=number>–</td>"
        return f'<td class=number style="--heat: {value:.0f}%"><span class=heat>{value:.1f}</span></td>'

    head = "".join(f"<th{' class=number' if i else ''}>{escape(name)}</th>" for i, name in enumerate(header))
    body = "".join(f"<tr><td>{escape(name)}</td>{''.join(map(cell, values))}</tr>" for name, values in rows)
    return f"<div class=scroll><table class=heats><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def legend(names: Sequence[str]) -> str:
    return f"<p class=legend>{''.join(f'<span class={css_name(name)}>{escape(name)}</span>' for name in names)}</p>"


def notes(terms: Sequence[tuple[str, str]]) -> str:
    """What the page's words mean."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in terms)
    return f"<section>\n<h2>What the numbers mean</h2>\n<dl class=notes>\n{items}</dl>\n</section>"
