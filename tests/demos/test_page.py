"""The page in a real browser: what a person does, and what they then read."""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demos import bad_files as bad

pytest.importorskip("playwright", reason="no Playwright: pip install -e '.[dev]'")
from playwright.sync_api import Browser, expect, sync_playwright

from tests.demos.browser import CHROMIUM, Demo, launch

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: sudo apt-get install chromium"
)

expect.set_options(timeout=30_000)  # cores are shared
WIDE, PHONE = (1280, 900), (390, 844)


def png(name: str = "red ladder", file: str = "photo.png") -> dict[str, Any]:
    return {"name": file, "mimeType": "image/png", "buffer": bad.encoded(bad.scene(name), "PNG")}


def sent(file: str, data: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
    return {"name": file, "mimeType": kind, "buffer": data}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def open_demo(browser, demo_url, tmp_path):
    """A visitor on a screen of some size; whatever they do, the page itself does not fail."""
    opened = []

    def visit(size: tuple[int, int] = WIDE, scheme: str = "light") -> Demo:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme,
            permissions=["camera"],
        )  # fmt: skip
        demo = Demo(context.new_page(), demo_url, tmp_path)
        opened.append((context, demo))
        return demo

    yield visit
    for context, demo in opened:
        context.close()
        assert demo.errors == []
        assert demo.strangers == []  # the page needs no other server


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        (WIDE, "light"),
        (PHONE, "dark"),
        pytest.param(WIDE, "dark", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", marks=pytest.mark.slow),
    ],
    ids=["wide light", "phone dark", "wide dark", "phone light"],
)
def test_a_picture_is_named_on_every_screen(size, scheme, open_demo, tmp_path):
    demo = open_demo(size, scheme)
    demo.upload("#picture", png())
    demo.expect_top("red ladder")
    demo.expect_top("red ladder", model=1)
    table = demo.page.locator("#table")
    expect(table).to_contain_text("1 of 1")
    demo.page.locator(".gallery-item").nth(1).click()
    expect(table).to_contain_text("2 of 2")
    expect(demo.page.locator("#chart svg")).to_be_visible()
    demo.keep("classify")
    for tab in ("Search", "Batch", "Report"):
        demo.open_tab(tab)
        demo.page.wait_for_timeout(300)
        demo.keep(tab)
        assert demo.width_overflow_px() <= 0
    expect(demo.page.locator("#cards")).to_contain_text("model card")
    expect(demo.page.locator("#cards")).to_contain_text("baked in only")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_labels_are_edited_freely(open_demo):
    demo = open_demo()
    demo.upload("#picture", png())
    demo.expect_top("red ladder")
    demo.write("#labels", "a red ladder\n<b id=evil>bold</b>, 🐶, كلب, 猫")
    demo.expect_top("a red ladder")
    bars = demo.page.locator("#bars-0")
    for label in ("<b id=evil>bold</b>", "🐶", "كلب", "猫"):
        expect(bars).to_contain_text(label)
    assert demo.page.locator("#evil").count() == 0
    expect(demo.page.locator("#bars-1")).to_be_hidden()  # it has no text side
    demo.expect_message("baked has no text side")
    demo.keep("labels")
    demo.write("#labels", " , ")
    demo.expect_message("there are no labels")
    demo.write("#labels", ",".join(map(str, range(10_000))))
    demo.expect_message("10,000 labels are too many")
    demo.write("#labels", "red ladder, blue cross")
    demo.expect_top("red ladder")


def test_where_it_looked_and_what_settings_change(open_demo):
    demo = open_demo()
    demo.upload("#picture", png("green heart"))
    demo.expect_top("green heart")
    demo.page.locator("#heat > button").click()
    demo.page.locator("#heat-show").click()
    expect(demo.page.locator("#heat-map img")).to_be_visible()
    demo.keep("heat map")
    demo.page.get_by_label("baked", exact=True).click()
    expect(demo.page.locator("#bars-1")).to_be_hidden()
    demo.write("#labels", "red ladder, blue cross")
    expect(demo.page.locator("#bars-0 h2")).not_to_have_text("green heart")
    demo.page.locator("#settings > button").click()
    demo.page.get_by_label("None of these").click()
    demo.expect_top("(none of these)")
    demo.page.locator("#preset input").click()
    demo.page.get_by_role("option", name="CIFAR-10").click()
    expect(demo.page.locator("#labels textarea")).to_have_value("\n".join(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    ))  # fmt: skip
    expect(demo.page.locator("#bars-0")).to_contain_text("frog")
    demo.write("#templates", "a photo")
    demo.expect_message("the template 'a photo' has no {c}")


BAD = {
    "photo.jpg": (b"these are words", "photo.jpg cannot be read: it is no JPEG"),
    "half.jpg": (bad.encoded(bad.scene(), "JPEG")[:700], "half.jpg cannot be read: "),
    "huge.png": (bad.huge_png(), "more than 64 megapixels"),
    "bold.png": (b"no", "bold.png cannot be read"),
}
HEART, CROSS, LADDER = (bad.scene(name) for name in ("green heart", "blue cross", "red ladder"))
ODD = {
    "moving.gif": (bad.animated_gif(HEART, CROSS), "green heart"),
    "print.jpg": (bad.encoded(LADDER.convert("CMYK"), "JPEG", quality=95), "red ladder"),
    "turned.jpg": (bad.rotated_jpeg(CROSS), "blue cross"),
    "alpha.png": (bad.encoded(LADDER.convert("RGBA"), "PNG"), "red ladder"),
    "deep.png": (bad.deep_png(HEART), None),  # grey: its colour is lost
}


def test_bad_pictures_are_told_and_odd_ones_named(open_demo):
    demo = open_demo()
    demo.write("#labels", "red ladder, blue cross, green heart")
    for name, (data, why) in BAD.items():
        demo.upload("#picture", sent(name, data, "image/png"))
        demo.expect_message(why)
    for name, (data, label) in ODD.items():
        demo.upload("#picture", sent(name, data, "image/png"))
        if label is not None:
            demo.expect_top(label)
    expect(demo.page.locator("#table")).to_contain_text(f"{len(ODD)} of {len(ODD)}")


def test_search_by_words_and_by_picture(open_demo):
    demo = open_demo()
    demo.open_tab("Search")
    demo.page.locator("#own > button").click()
    names = ["red ladder", "blue cross", "green heart", "white wall"]
    members = {f"<b>{name}</b>.png": png(name)["buffer"] for name in names[:3]}
    members["white wall.jpg"] = b"no picture"
    demo.upload("#search-files", sent("many.zip", bad.zipped(members), "application/zip"))
    expect(demo.page.locator("#search-files")).to_contain_text("many")
    demo.page.locator("#index").click()
    searching = demo.page.locator("#searching textarea, #searching input").first
    expect(searching).to_have_value(
        "3 pictures of yours, by sample; 1 cannot be read: white wall.jpg (it is no JPEG, PNG, "
        "WebP, GIF, BMP or TIFF picture)"
    )
    demo.write("#query", "a picture of a green heart.")
    demo.page.locator("#search").click()
    first = demo.page.locator("#found .grid-container button, #found button.thumbnail-item").first
    expect(first).to_contain_text("<b>green heart</b>.png")
    demo.keep("search")
    demo.upload("#like", png("blue cross"))
    expect(first).to_contain_text("1.000")
    expect(first).to_contain_text("<b>blue cross</b>.png")
    for data, why in ((bad.zip_bomb(), "pictures do not"),
                      (bad.zipped({"../x.png": b""}), "a path that leaves it")):  # fmt: skip
        demo.page.locator("#search-files button[aria-label='Clear'], "
                          "#search-files button[title='Clear']").first.click()  # fmt: skip
        demo.upload("#search-files", sent("bad.zip", data, "application/zip"))
        expect(demo.page.locator("#search-files")).to_contain_text("bad")
        demo.page.locator("#index").click()
        demo.expect_message(why)


def test_a_batch_gives_a_table_and_can_be_stopped(open_demo, tmp_path):
    demo = open_demo()
    demo.open_tab("Batch")
    demo.page.locator("#batch").click()
    demo.expect_message("there are no pictures yet")
    demo.upload("#batch-files", png("blue cross", "one.png"), sent("two.jpg", b"words"))
    expect(demo.page.locator("#batch-files")).to_contain_text("two")
    demo.page.locator("#batch").click()
    link = demo.page.locator("#batch-table a[download]").first
    with demo.page.expect_download() as download:
        link.click()
    with Path(download.value.path()).open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], row["label_1"]) for row in rows] == [
        ("one.png", "blue cross"), ("two.jpg", "")
    ]  # fmt: skip
    assert rows[1]["error"].startswith("it is no JPEG")
    demo.page.locator("#batch-files button[aria-label='Clear']").first.click()
    picture = bad.encoded(bad.scene(), "JPEG", quality=50)
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(4000):
            archive.writestr(f"{number}.jpg", picture)
    demo.upload("#batch-files", tmp_path / "many.zip")
    expect(demo.page.locator("#batch-files")).to_contain_text("many")
    demo.page.locator("#batch").click()
    said = demo.page.locator("#batch-said textarea").first
    expect(said).to_have_value(re.compile("^[1-9][0-9,]* of 4,000 pictures$"))
    demo.page.locator("#batch-stop").click()
    expect(said).to_have_value(re.compile("^stopped after [0-9,]+ of 4,000 pictures in"))
    demo.keep("batch")
    with demo.page.expect_download() as download:
        demo.page.locator("#batch-table a[download]").first.click()
    rows = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(rows) - 1 == int(said.input_value().split()[2].replace(",", ""))
    demo.open_tab("Classify")  # and the server goes on
    demo.upload("#picture", png("blue cross"))
    demo.expect_top("blue cross")


@pytest.mark.slow  # Chromium encodes its own test pattern, on the same cores
def test_a_camera_is_answered_frame_by_frame(open_demo):
    demo = open_demo()
    demo.open_tab("Camera")
    demo.page.get_by_text("Click to Access Webcam").click()
    demo.page.get_by_label("capture photo").click()
    demo.page.wait_for_function(
        "/^[0-9.]+ frames.s: sample [0-9.]+ ms/.test("
        "document.querySelector('#rate textarea, #rate input').value)"
    )
    expect(demo.page.locator("#bars-0 h2")).not_to_be_empty()
    demo.keep("camera")
