"""The page as a person meets it, in a headless Chromium; its screenshots are kept in pytest's temporary folder."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Running, photo, running

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")

CAT = Path(__file__).parents[2] / "examples" / "cat.png"
PATIENCE_MS = 15_000

MAKE_FILES = """files => {
    const transfer = new DataTransfer();
    for (const {name, type, data} of files) {
        const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type}));
    }
    return transfer;
}"""
# The middle of a canvas's brightest points, as fractions of its width and height; green grows with the map's values.
BRIGHTEST = """canvas => {
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    let [most, count, across, down] = [-1, 0, 0, 0];
    for (let i = 0; i < width * height; i++) {
        const green = data[4 * i + 1];
        if (green > most) [most, count, across, down] = [green, 0, 0, 0];
        if (green === most) {
            count += 1;
            across += (i % width) + 0.5;
            down += Math.floor(i / width) + 0.5;
        }
    }
    return [across / count / width, down / count / height];
}"""
PASTE = "clipboardData => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}))"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # A camera that shows a test picture, and is allowed without a question.
        flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        opened = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def site(run_folder) -> Iterator[Running]:
    with running("default", run_folder) as started:
        yield started


class Visit:
    """A visitor's page, what its console said, and what it asked for."""

    def __init__(self, browser, site: Running, **options) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1100, "height": 800}, **options})
        self.page.set_default_timeout(PATIENCE_MS)
        self.address = f"http://127.0.0.1:{site.port}/"
        self.console, self.requests = [], []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.address)
        self.page.wait_for_selector("#model:enabled")

    def files(self, *files: tuple[str, str, bytes]):
        listed = [{"name": name, "type": kind, "data": base64.b64encode(data).decode()} for name, kind, data in files]
        return self.page.evaluate_handle(MAKE_FILES, listed)

    def drop(self, *files: tuple[str, str, bytes]) -> None:
        self.page.dispatch_event("#zone", "drop", {"dataTransfer": self.files(*files)})

    def best(self) -> str:
        self.page.wait_for_selector("#result:visible #classes li")
        return self.page.inner_text("#best")

    def problem(self) -> str:
        self.page.wait_for_selector("#problem:visible")
        return " / ".join(self.page.locator("#problem p").all_inner_texts())


@pytest.fixture
def visit(browser, site):
    """Visit the page; at the end nothing may have been said in the console, or asked of another host."""
    visits = []

    def begin(**options) -> Visit:
        visits.append(Visit(browser, site, **options))
        return visits[-1]

    yield begin
    for made in visits:
        made.page.close()
        assert made.console == []
        assert [url for url in made.requests if not url.startswith((made.address, f"blob:{made.address}"))] == []


def test_dropped_photo_is_named(visit, tmp_path):
    made = visit()
    made.page.screenshot(path=tmp_path / "start.png")
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert made.best() == "cat"
    labels, shares = (made.page.locator(f"#classes .{name}").all_inner_texts() for name in ("label", "share"))
    assert (labels[0], len(labels), len(shares)) == ("cat", 5, 5)
    widths = made.page.eval_on_selector_all(
        "#classes .fill", "fills => fills.map(fill => parseFloat(fill.style.width))"
    )
    assert widths == sorted(widths, reverse=True)
    assert shares[0] == f"{widths[0]:.0f}%"
    assert "Answered in" in made.page.inner_text("#timing")
    assert made.page.get_by_role("status").inner_text().startswith(f"mine.png: cat {shares[0]}, ")
    assert made.page.evaluate("document.querySelector('#photo').naturalWidth") == 451
    made.page.screenshot(path=tmp_path / "result.png")
    assert (tmp_path / "result.png").stat().st_size > 50_000  # with the photo in it


def test_dropped_text_gets_the_servers_sentence(visit, tmp_path):
    made = visit()
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    made.best()
    made.drop(("<b>notes</b>.txt", "text/plain", b"hello"))
    assert made.problem().startswith("<b>notes</b>.txt was not classified / A photo must be a JPEG, PNG, ")
    assert not made.page.is_visible("#result")
    assert not made.page.is_visible("#retry")
    made.page.screenshot(path=tmp_path / "problem.png")
    assert [text for text in made.console if "422" not in text] == []
    made.console.clear()  # the browser itself notes each refusal
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert made.best() == "cat"
    assert not made.page.is_visible("#problem")


def test_page_is_used_by_the_keyboard_alone(visit):
    made = visit()

    def focused() -> str:
        return made.page.evaluate("document.activeElement.innerText || document.activeElement.id")

    def tab_to(name: str) -> None:
        for _ in range(20):
            made.page.keyboard.press("Tab")
            if focused().split("\n")[0] == name:
                width = "getComputedStyle(document.activeElement.matches('.switch input') ? "
                width += "document.activeElement.nextElementSibling : document.activeElement).outlineWidth"
                assert made.page.evaluate(width) == "3px"  # where one is can be seen
                return
        raise AssertionError(f"the Tab key does not come to {name}")

    choosers = []
    made.page.on("filechooser", lambda chooser: choosers.append(chooser))
    tab_to("Choose a photo")
    made.page.keyboard.press("Enter")
    tab_to("Cat")
    made.page.keyboard.press("Enter")
    assert made.best() == "cat"
    tab_to("heat-switch")
    made.page.keyboard.press("Space")
    made.page.wait_for_selector("#heat:visible")
    assert len(choosers) == 1
    tab_to("dog")
    made.page.keyboard.press("Enter")
    made.page.wait_for_selector("#classes button[aria-pressed=true]:has-text('dog')")
    assert made.page.get_by_role("img", name="Where the model looked for dog").is_visible()
    assert made.page.get_by_role("status").inner_text() == "The photo shows where the model looked for dog."


def test_everything_to_act_on_has_a_name(visit):
    made = visit()
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    made.best()
    named = "element => Boolean(element.labels?.[0]?.innerText.trim() || element.innerText.trim())"
    names = made.page.evaluate(f"[...document.querySelectorAll('button, select, input:not([hidden])')].map({named})")
    assert len(names) > 8
    assert all(names)
    assert made.page.get_by_role("heading", level=1).inner_text() == "What is in this photo?"
    assert made.page.get_by_role("switch", name="Show where the model looked").count() == 1
    assert made.page.get_by_role("combobox", name="Model").count() == 1


def test_heat_map_lies_over_what_the_model_sees(visit, tmp_path):
    made = visit()
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    made.best()
    assert not made.page.is_visible("#heat")
    made.page.click("text=Show where the model looked")
    made.page.wait_for_selector("#heat:visible")
    made.page.screenshot(path=tmp_path / "heat.png")
    assert made.page.eval_on_selector("#heat", "canvas => [canvas.width, canvas.height]") == [720, 479]
    assert made.page.locator("#heat").bounding_box() == made.page.locator("#photo").bounding_box()
    line = (
        "(c => [...c.getContext('2d').getImageData(0, c.height / 2, c.width, 1).data])(document.querySelector('#heat'))"
    )
    pixels = made.page.evaluate(line)
    dark = [max(pixels[4 * x : 4 * x + 3]) < 20 and pixels[4 * x + 3] > 180 for x in range(720)]
    assert pixels[4 * 360 + 3] < 180  # the photo shines through
    begin, end = dark.index(False), len(dark) - dark[::-1].index(False)
    assert (begin, end) == (pytest.approx(720 * 48 / 240, abs=2), pytest.approx(720 * 192 / 240, abs=2))
    made.page.click("text=Show where the model looked")
    assert not made.page.is_visible("#heat")


def test_brightest_place_is_the_strongest_cells_centre(visit):
    made = visit()
    values = [[0, 0, 0, 0, 0], [0, 0, 0, 9, 0], [0, 0, -5, 0, 0], [0, 0, 0, 0, 0]]
    box = {"left": 0.15, "top": -0.1, "right": 0.95, "bottom": 0.9}
    seen = {"left": 0.2, "top": 0.0, "right": 0.9, "bottom": 1.0}
    row = {"path": None, "status": "ok", "error": None, "top": [{"label": "cat", "index": 0, "probability": 1.0}]}
    row["heatmap"] = {"index": 0, "rows": 4, "columns": 5, "values": values, "box": box, "seen": seen}
    made.page.route("**/v1/classify?*", lambda route: route.fulfill(json=row))
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    made.best()
    made.page.click("text=Show where the model looked")
    made.page.wait_for_selector("#heat:visible")
    across, down = made.page.eval_on_selector("#heat", BRIGHTEST)
    assert across == pytest.approx(0.15 + 3.5 / 5 * 0.8, abs=0.02)
    assert down == pytest.approx(-0.1 + 1.5 / 4, abs=0.02)


def test_other_model_is_asked_about_the_photo_on_show(visit, run_folder):
    made = visit()
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert made.best() == "cat"
    assert "knows 112 things" in made.page.inner_text("#scope")
    assert made.page.locator("#model option").all_inner_texts() == ["default", str(run_folder)]
    made.page.select_option("#model", str(run_folder))
    made.page.wait_for_selector("#scope:has-text('knows 5 things')")
    assert set(made.page.locator("#classes .label").all_inner_texts()) == {"cat", "dog", "fox", "tree", "house"}


@pytest.mark.parametrize(
    ("told", "eyebrow", "scope"),
    [
        ({}, "Best guess", "things and names the likeliest of them, even when the photo shows none."),
        ({"known": True}, "Best guess", "This model knows 112 things."),
        ({"known": False}, "Nothing I know; nearest", "112 things, and this photo looks like none of them."),
    ],
    ids=["cannot tell", "known", "unknown"],
)
def test_photo_of_none_of_the_classes_is_called_so(visit, told, eyebrow, scope):
    made = visit()
    row = {"path": None, "status": "ok", "error": None, "top": [{"label": "cat", "index": 0, "probability": 0.1}]}
    made.page.route("**/v1/classify?*", lambda route: route.fulfill(json={**row, **told}))
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert made.best() == "cat"
    assert made.page.text_content("#eyebrow") == eyebrow
    assert made.page.inner_text("#scope").endswith(scope)
    assert ("nothing I know" in made.page.text_content("#status")) == (told == {"known": False})


def test_pasted_photo_is_named(visit):
    made = visit()
    made.page.evaluate(PASTE, made.files(("image.png", "image/png", CAT.read_bytes())))
    assert made.best() == "cat"
    made.page.evaluate(PASTE, made.files())
    assert made.problem() == "No photo / There is no photo in this. Drop or paste the photo's file itself."


def test_camera_takes_a_photo(visit):
    made = visit()
    made.page.click("text=Use the camera")
    made.page.click("text=Take it")
    assert made.best()
    assert made.page.evaluate("document.querySelector('#camera-view').srcObject") is None
    made.page.click("text=Use the camera")
    made.page.wait_for_selector("#camera-dialog:visible")
    made.page.keyboard.press("Escape")
    made.page.wait_for_selector("#camera-dialog", state="hidden")


def test_busy_server_is_asked_again_on_request(visit):
    made = visit()
    row = {"path": None, "status": "error", "error": "64 photos are in work, the most at once.", "top": []}
    made.page.route("**/v1/classify?*", lambda route: route.fulfill(status=429, json=row), times=1)
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert "64 photos are in work" in made.problem()
    made.page.click("text=Try again")
    assert made.best() == "cat"
    made.page.route("**/v1/classify?*", lambda route: route.abort(), times=1)
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert "cannot be reached" in made.problem()
    made.console.clear()  # the browser itself notes each refusal


def test_last_photo_wins_over_a_slow_one(visit):
    made = visit()
    held = []
    made.page.route("**/v1/classify?*", lambda route: held.append(route), times=1)
    made.drop(("slow.png", "image/png", photo()))
    made.drop(("mine.png", "image/png", CAT.read_bytes()))
    assert made.best() == "cat"
    assert len(held) == 1
    assert made.page.get_by_role("status").inner_text().startswith("mine.png: ")


def test_photo_that_the_browser_cannot_show_is_named_all_the_same(visit):
    made = visit()
    made.drop(("mine.tif", "image/tiff", photo(suffix=".tiff")))
    assert made.best()
    made.page.wait_for_selector("#no-preview:visible")
    assert not made.page.is_visible("#heat-switch")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(visit, tmp_path, scheme):
    made = visit(viewport={"width": 360, "height": 700}, color_scheme=scheme, has_touch=True, is_mobile=True)
    made.page.set_input_files("#file", CAT)
    made.best()
    made.page.click("text=Show where the model looked")
    assert made.page.evaluate("document.documentElement.scrollWidth") == 360
    heights = made.page.eval_on_selector_all(
        "button, select", "all => all.map(e => e.getBoundingClientRect().height).filter(height => height)"
    )
    assert min(heights) >= 44  # px, what a thumb hits
    ground = made.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 60) == (scheme == "dark")
    made.page.screenshot(path=tmp_path / "phone.png", full_page=True)


def test_narrowest_phone_shows_the_models_name(browser, site):
    visit = Visit(browser, site, viewport={"width": 320, "height": 600})
    picker = visit.page.get_by_role("combobox", name="Model")  # named so even where there is no room to write it
    room, wanted = picker.evaluate("""select => {
        const width = select.offsetWidth;
        select.replaceChildren(new Option("default"));
        select.style.flex = "none";
        return [width, select.offsetWidth];
    }""")
    assert room >= wanted
    visit.page.close()
