import importlib.util
import os
import shutil

import pytest
import report_records as made

from sparse_attention_decoder.measure.report import write

# set where a browser has to be there: these tests fail without it then, and are skipped otherwise
REQUIRE_BROWSER = "SPARSE_ATTENTION_DECODER_REQUIRE_BROWSER"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync"]  # fmt: skip
PHONE, DESK, PAPER = (360, 800), (1280, 900), (703, 1000)

CONTRAST = """() => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const pair = [light(parts(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => a - b);
    found.push([(pair[1] + 0.05) / (pair[0] + 0.05), element.tagName]);
  }
  return found;
}"""
SHOWN = "() => [...document.images].filter(image => image.checkVisibility()).map(image => image.className)"
LOADED = "() => [...document.images].map(image => image.complete && image.naturalWidth)"
WIDTHS = "() => [document.documentElement.scrollWidth, innerWidth]"
WIDER_THAN_PAPER = """() => [...document.querySelectorAll('table')]
  .filter(table => table.checkVisibility() && table.getBoundingClientRect().right > innerWidth)
  .map(table => table.caption.innerText)"""


def lacking(what):
    (pytest.fail if os.environ.get(REQUIRE_BROWSER) else pytest.skip)(f"{what} is not installed")


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        lacking("playwright")
    path = shutil.which("chromium")
    if path is None:
        lacking("chromium")
    if importlib.util.find_spec("matplotlib") is None:
        lacking("matplotlib")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write([made.write(folder / "records.jsonl", made.everything())], folder / "out")[0].as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page in a window of a size and colour scheme; whatever it says or asks for fails the test."""
    contexts = []

    def open_page(size, scheme):
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme))
        view = contexts[-1].new_page()
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("dialog", lambda dialog: said.append(dialog.message))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(address)
        return view

    said, asked = [], []
    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_page_fits_is_readable_and_shows_the_pictures_of_its_scheme(opened, size, scheme):
    view = opened(size, scheme)
    wide, window = view.evaluate(WIDTHS)
    assert wide <= window == size[0]
    assert all(view.evaluate(LOADED))
    assert view.evaluate(SHOWN) == [scheme] * 8
    pairs = view.evaluate(CONTRAST)
    assert len(pairs) > 500
    assert min(pairs)[0] >= 4.5, min(pairs)
    # the long table too
    view.click("summary")
    assert view.evaluate(WIDTHS)[0] <= size[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_it_is_light_and_whole(opened, scheme):
    view = opened(PAPER, scheme)
    view.emulate_media(media="print")
    assert view.evaluate(SHOWN) == ["light"] * 8
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert view.evaluate(WIDTHS)[0] <= PAPER[0]
    assert view.evaluate(WIDER_THAN_PAPER) == []
    assert min(view.evaluate(CONTRAST))[0] >= 4.5
    # folded on a screen, open on paper
    assert view.evaluate("document.querySelector('details table').checkVisibility()")


def test_a_wide_table_scrolls_in_its_own_box_and_keeps_the_names_in_sight(opened):
    view = opened(PHONE, "light")
    box = view.locator("#speed .scroll").first
    box.evaluate("box => box.scrollLeft = 200")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth && box.scrollLeft") == 200
    left = "box => box.querySelector('tbody tr:nth-child(2) th').getBoundingClientRect().left"
    assert box.evaluate(left) == box.evaluate("box => box.getBoundingClientRect().left")
