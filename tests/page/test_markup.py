"""The HTML of a page: what is escaped, and that its parts can be found and read aloud."""

from html.parser import HTMLParser

import pytest

from sop_jax.page import markup


class Elements(HTMLParser):
    """The start tags of a text, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


BAD = "<img src=x onerror=alert(1)>\"'&\udce9\n"


def test_everything_is_escaped() -> None:
    parts = [
        markup.paragraph(BAD),
        markup.section("name", BAD, ""),
        markup.contents([("name", BAD)]),
        markup.figure("", BAD),
        markup.details(BAD, ""),
        markup.table([BAD, BAD], [[BAD, BAD]], BAD),
        markup.page(BAD, ""),
    ]
    for text in parts:
        assert not [tag for tag, _ in Elements(text).found if tag == "img"], text
        text.encode()  # no surrogate is left
    assert "\\xe9" in parts[0]


def test_a_body_can_contain_the_marks_of_the_page() -> None:
    text = markup.page("{{body}}", "<p>{{script}} {{title}}</p>", "1;")
    assert "<title>{{body}}</title>" in text and "<p>{{script}} {{title}}</p>" in text
    assert text.count("<script>") == 1


def test_a_page_without_a_script_has_none() -> None:
    assert "<script" not in markup.page("a", "b")


def test_a_table_names_its_rows_and_columns() -> None:
    text = markup.table(["", "loss"], [["run", 1.5], ["other", None]], "Losses")
    found = Elements(text).found
    assert [attrs.get("scope") for tag, attrs in found if tag == "th"] == ["col", "row", "row"]
    assert "<caption>Losses</caption>" in text and "<td>–</td>" in text
    own = {"class": "scroll", "tabindex": "0", "role": "group", "aria-label": "Losses"}
    assert ("div", own) in found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "True"),
        (12345, "12,345"),
        (0.0, "0.00"),
        (0.25, "0.25"),
        (1234.5, "1,234.50"),
        (0.00012345, "0.0001234"),
        (2.5e9, "2.5e+09"),
        (-0.5, "-0.50"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert markup.cell_text(value) == text


def test_the_page_knows_dark_print_and_no_other_file() -> None:
    text = markup.page("a", "b")
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "http" not in text and "@import" not in text and "url(" not in text
