from __future__ import annotations

from dimefm_edge.tables import format_table


def test_numbers_go_right_and_text_left():
    rows = [("a", 1.23456, None, True), ("long name", 12345.6, 7, False)]
    assert format_table(("model", "ms", "count", "fits"), rows).splitlines() == [
        "model         ms  count  fits",
        "---------  -----  -----  ----",
        "a           1.23      -  yes",
        "long name  12346      7  no",
    ]


def test_no_rows():
    assert format_table(("a", "b"), []).splitlines() == ["a  b", "-  -"]
