"""`tools.table`: columns of equal width, flush left or right."""

from tools.table import aligned


def test_columns() -> None:
    rows = [["name", "kind", "us", "note"], ["a", "long one", "12345", ""]]
    assert aligned(rows, left=2) == [
        "name  kind         us  note",
        "a     long one  12345",
    ]
    assert aligned(rows, left=4)[0] == "name  kind      us     note"
    assert aligned([["x"]], left=0) == ["x"]
