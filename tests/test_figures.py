"""README and docs hold figures of committed rows alone, as `make figures` writes them."""

import pytest

from bench import figures

PAGES = {page: (figures.ROOT / page).read_text() for page in figures.PAGES}


@pytest.mark.parametrize("page", figures.PAGES)
def test_every_figure_is_that_of_its_row(page):
    assert figures.filled(PAGES[page]) == PAGES[page], "stale: run make figures"


@pytest.mark.parametrize("page", figures.PAGES)
def test_no_measurement_stands_without_a_row(page):
    assert not list(figures.loose(page, PAGES[page]))


def test_every_figure_is_used_and_every_exception_is_needed():
    names = {match["name"] for text in PAGES.values() for match in figures._FIGURE.finditer(text)}
    assert names == figures.FIGURES.keys()
    for page, exceptions in figures.NOT_FIGURES.items():
        assert all(words in PAGES[page] for words in exceptions)


def test_a_stale_page_is_found_and_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", ("README.md",))
    monkeypatch.setattr(figures, "FIGURES", {"a": lambda: "3.5", "b": lambda: "| x |\n| y |"})
    page = tmp_path / "README.md"
    page.write_text("takes <!--fig a-->2.0<!--/--> ms\n<!--fig b--><!--/-->\n")
    assert figures.main(["--check"]) == 1 and "stale: README.md" in capsys.readouterr().out
    assert figures.main([]) == 0
    assert page.read_text() == "takes <!--fig a-->3.5<!--/--> ms\n<!--fig b-->\n| x |\n| y |\n<!--/-->\n"
    assert figures.main(["--check"]) == 0 and figures.main([]) == 0


@pytest.mark.parametrize("name, message", [("c", "got 'c'"), ("d", "found none")])
def test_a_figure_without_a_row_is_one_sentence(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", ("README.md",))
    monkeypatch.setattr(
        figures, "FIGURES", {"d": lambda: figures.newest("nvidia-h200/steps.jsonl", mode="none")["p50_ms"]}
    )
    (tmp_path / "README.md").write_text(f"<!--fig {name}-->1<!--/-->")
    assert figures.main([]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: README.md: ") and "expected" in error and message in error and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    "line, found",
    [
        ("takes 3.5 ms", ["3.5 ms"]), ("2.5x as fast, 20 % less", ["2.5x", "20 %"]), ("8 x 512 tokens at r16", []),
        ("keeps 7.77 GiB in 32 layers", ["7.77 GiB"]), ("<!--fig a-->3.5 ms<!--/-->", []),
        ("version 2.11, 4 heads", []),
    ],
)  # fmt: skip
def test_what_looks_like_a_measurement(line, found, monkeypatch):
    monkeypatch.setitem(figures.NOT_FIGURES, "README.md", ())
    assert [text for _, text in figures.loose("README.md", line)] == found
