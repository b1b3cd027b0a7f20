"""The page of a report in a real browser: Debian's chromium and its driver, without a window."""

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import smooth_case
from PIL import Image
from report_cases import DrawnSource, drawn_judgement, shape_of
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from segtrain.evaluation.bootstrap import compare
from segtrain.evaluation.figures import image_ious
from segtrain.evaluation.judgement import Judgement
from segtrain.evaluation.report.folder import picture_path
from segtrain.evaluation.report.gallery import Gallery
from segtrain.evaluation.report.page import write_report
from segtrain.images import Pixels

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

NUM, MANY = 100, 5000
NASTY = "</script><img src=x onerror=alert(1)>.jpg"
# Long enough for a slow machine; nothing waits longer than it has to.
PATIENCE = 60
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """A driver, and what the tests ask of it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(
        self,
        page: Path,
        *,
        hash: str = "",
        width: int = 1280,
        scheme: str = "light",
        motion: str = "reduce",  # a click would miss what is still gliding
    ) -> None:
        """From nothing: an address that differs in its hash alone would load nothing."""
        self.driver.get("about:blank")
        self.resize(width)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(page.as_uri() + hash)

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def style(self, selector: str, name: str) -> str:
        return self.run(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
            *(selector, name),
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.05)

    def num_loaded(self) -> int:
        """Pictures whose bytes are there."""
        script = "return [...document.images].filter(i => i.complete && i.naturalWidth).length"
        return int(self.run(script))

    @property
    def viewer_open(self) -> bool:
        return bool(self.run("return document.getElementById('viewer').open"))

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Of the console, since it was last asked."""
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    assert DRIVER is not None, "chromium is there, its driver is not: install chromium-driver"
    service = Service(DRIVER, log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """Ends in an error where the console got any line at all."""
    started.run("try { localStorage.clear() } catch {}")
    yield started
    assert started.complaints == []


@pytest.fixture(scope="module")
def judgement() -> Judgement:
    names = [f"picture {index}" for index in range(NUM)]
    names[7] = NASTY
    records = drawn_judgement(NUM).totals.records
    # Against itself: every difference may be chance, which is said, too.
    return drawn_judgement(NUM, names=names, comparison=compare(records, records))


@pytest.fixture(scope="module")
def page(judgement: Judgement, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    gallery = Gallery(folder, DrawnSource(NUM), judgement.totals.threshold)
    for index in range(NUM):
        gallery.add(index, *smooth_case(index, shape_of(index)))
    return write_report(folder, judgement)


@pytest.fixture(scope="module")
def large_page(judgement: Judgement, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 pictures that share the files of a hundred."""
    folder = tmp_path_factory.mktemp("large")
    records = np.resize(judgement.totals.records, MANY)
    records["index"] = np.arange(MANY)
    for index in range(MANY):
        for kind in ("photo", "thumb", "truth", "prediction", "errors"):
            path = picture_path(folder, index, kind)
            path.parent.mkdir(exist_ok=True)
            path.hardlink_to(picture_path(page.parent, index % NUM, kind))
    large = replace(
        judgement,
        totals=replace(judgement.totals, records=records),
        image_ids=[f"picture {index}" for index in range(MANY)],
    )
    return write_report(folder, large)


def names_by(values: "np.typing.ArrayLike", judgement: Judgement) -> list[str]:
    """In rising order of `values`, equal ones by their number."""
    order = np.argsort(np.asarray(values), kind="stable")
    return [judgement.image_ids[at] for at in order]


# --- Loading ------------------------------------------------------------------------------------


def test_every_picture_of_the_first_card_and_of_the_viewer_loads(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    card = browser.find(".card")
    browser.run("arguments[0].scrollIntoView()", card)
    images = "return [...document.querySelectorAll(arguments[0])].every(i => i.naturalWidth > 0)"
    browser.wait_for(lambda: browser.run(images, "#cards li:first-child img"))
    card.click()
    browser.wait_for(lambda: browser.run(images, "#stage img"))


def test_a_console_that_complains_would_be_noticed(started: Browser, page: Path) -> None:
    started.open(page)
    broken = page.with_name("broken.html")
    broken.write_text('<img src="pictures/none.jpg">')
    started.open(broken)
    started.wait_for(lambda: started.complaints)


def test_names_are_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.find("#search").send_keys("script")
    browser.wait_for(lambda: browser.texts(".card .name") == [NASTY])
    browser.find(".card").click()
    assert browser.find("#viewer-name").text == NASTY
    assert browser.run("return document.querySelectorAll('[onerror], img[src=x]').length") == 0


# --- Order and filters --------------------------------------------------------------------------


def test_pictures_are_sorted(browser: Browser, page: Path, judgement: Judgement) -> None:
    records = judgement.totals.records
    frame = records["size"].prod(axis=1)
    ious, missed = image_ious(records).round(6), records["confusion"][:, 1, 0] / frame
    orders = {
        "best": -ious,
        "missed": -missed.round(6),
        "invented": -(records["confusion"][:, 0, 1] / frame).round(6),
        "smallest": (records["confusion"][:, 1].sum(axis=1) / frame).round(6),
        "worst": ious,
    }
    browser.open(page)
    first = len(browser.texts(".card"))
    assert 0 < first < NUM
    assert browser.texts(".card .name") == names_by(ious, judgement)[:first]
    for name, values in orders.items():
        Select(browser.find("#order")).select_by_value(name)
        assert browser.texts(".card .name")[:first] == names_by(values, judgement)[:first], name
    Select(browser.find("#order")).select_by_value("name")
    numbered = [f"picture {index}" for index in range(NUM) if index != 7]
    assert browser.texts(".card .name")[:first] == [NASTY, *numbered][:first]


def test_filters_count_and_combine(browser: Browser, page: Path, judgement: Judgement) -> None:
    people = np.minimum(judgement.totals.records["num_people"], 3)
    touches = judgement.totals.records["touches_frame"]
    browser.open(page)
    assert browser.find("#count").text == f"{NUM} pictures"
    Select(browser.find("[data-filter='1']")).select_by_value("2")
    wanted = int(np.count_nonzero(people == 2))
    assert 0 < wanted < NUM
    assert browser.find("#count").text == f"{wanted} of {NUM} pictures"
    Select(browser.find("[data-filter='2']")).select_by_value("0")
    both = np.flatnonzero((people == 2) & touches)
    assert browser.find("#count").text == f"{len(both)} of {NUM} pictures"
    assert set(browser.texts(".card .name")) == {judgement.image_ids[at] for at in both}

    browser.find("button[type=reset]").click()
    browser.wait_for(lambda: browser.find("#count").text == f"{NUM} pictures")
    assert browser.find("#count").get_attribute("aria-live") == "polite"


def test_a_slice_of_the_table_filters_the_gallery(browser: Browser, page: Path) -> None:
    browser.open(page)
    link = browser.find("a[data-group='4'][data-part='1']")
    assert link.text == "there"
    browser.run("arguments[0].click()", link)
    assert browser.find("#count").text == f"{NUM // 2} of {NUM} pictures"


def test_another_layer_can_be_laid_over_all_cards(browser: Browser, page: Path) -> None:
    browser.open(page)
    sources = "return [...document.querySelectorAll('.card .layer')].map(i => i.src.slice(-10))"
    assert set(browser.run(sources)) == {"errors.png"}
    browser.find("[name=layer][value=errors]").send_keys(Keys.ARROW_RIGHT)
    assert {source[-9:] for source in browser.run(sources)} == {"truth.png"}
    browser.find("[name=layer][value=truth]").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert browser.style(".card .layer", "display") == "none"


# --- The viewer, by keyboard --------------------------------------------------------------------


def test_the_keyboard_opens_leafs_through_and_closes(
    browser: Browser, page: Path, judgement: Judgement
) -> None:
    worst = names_by(image_ious(judgement.totals.records).round(6), judgement)
    browser.open(page)
    # From the top of the page, with nothing but Tab.
    for _ in range(200):
        browser.press(Keys.TAB)
        if browser.run("return document.activeElement.matches('.card')"):
            break
    assert browser.style(":focus", "outlineStyle") == "solid"
    browser.press(Keys.ENTER)
    assert browser.viewer_open
    assert browser.find("#viewer-name").text == worst[0]
    assert browser.find("#previous").get_property("disabled")

    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert browser.find("#viewer-name").text == worst[2]
    assert browser.find("#viewer-place").text == f"3 of {NUM}"
    index = judgement.image_ids.index(worst[2])
    assert browser.driver.current_url.endswith(f"#picture-{index}")

    browser.press(Keys.ESCAPE)
    browser.wait_for(lambda: not browser.viewer_open)
    browser.wait_for(lambda: browser.run("return document.activeElement.matches('.card')"))
    assert worst[2] in browser.run("return document.activeElement.textContent")
    assert "#" not in browser.driver.current_url


def test_the_slider_wipes_between_truth_and_prediction(browser: Browser, page: Path) -> None:
    browser.open(page, hash="#picture-4")
    assert browser.viewer_open
    assert browser.find("#viewer-name").text == "picture 4"
    slider = browser.find("#wipe")

    def cut() -> tuple[float, float]:
        """Per cent that are cut off the truth at the right, and off the prediction at the left."""
        truth, prediction = (
            browser.style(f"#stage [data-kind={kind}]", "clipPath")
            for kind in ("truth", "prediction")
        )
        right = re.fullmatch(r"inset\(0px (?:calc\()?([\d.]+)%\)? 0px 0px\)", truth)
        left = re.fullmatch(r"inset\(0px 0px 0px ([\d.]+)%\)", prediction)
        assert right is not None, truth
        assert left is not None, prediction
        return float(right[1]), float(left[1])

    assert cut() == (50, 50)
    slider.send_keys(*[Keys.ARROW_RIGHT] * 10)
    assert cut() == (40, 60)
    # The arrows have moved the line and not the picture.
    assert browser.find("#viewer-name").text == "picture 4"
    assert slider.get_attribute("aria-valuetext") == "truth in the left 60 per cent"
    slider.send_keys(Keys.HOME)
    assert cut() == (100, 0)
    slider.send_keys(Keys.END)
    assert cut() == (0, 100)


def test_what_is_seen_is_truth_at_the_left_and_prediction_at_the_right(
    browser: Browser, page: Path
) -> None:
    browser.open(page, hash="#picture-0")
    loaded = "return [...document.querySelectorAll('#stage img')].every(i => i.naturalWidth > 0)"
    browser.wait_for(lambda: browser.run(loaded))

    def seen(*layers: str) -> tuple[Pixels, Pixels]:
        """Left and right of the line, without it and without the labels in the corners."""
        for box in browser.driver.find_elements(By.CSS_SELECTOR, "[data-layer]"):
            if box.is_selected() != (box.get_attribute("data-layer") in layers):
                box.send_keys(Keys.SPACE)
        png = io.BytesIO(browser.find("#stage").screenshot_as_png)
        pixels = np.asarray(Image.open(png).convert("RGB"))[60:]
        middle = pixels.shape[1] // 2
        return pixels[:, : middle - 8], pixels[:, middle + 8 :]

    bare, truth, prediction = seen(), seen("truth"), seen("prediction")
    both, errors = seen("truth", "prediction"), seen("errors")
    same = np.array_equal
    assert same(both[0], truth[0])
    assert same(both[1], prediction[1])
    assert same(truth[1], bare[1])
    assert same(prediction[0], bare[0])
    assert not same(truth[0], bare[0])
    assert not same(prediction[1], bare[1])
    assert not same(errors[0], bare[0])
    assert not same(errors[1], bare[1])


def test_an_unknown_address_opens_nothing(browser: Browser, page: Path) -> None:
    browser.open(page, hash=f"#picture-{NUM}")
    assert not browser.viewer_open
    browser.run("location.hash = '#picture-2'")
    browser.wait_for(lambda: browser.viewer_open)


# --- Looks --------------------------------------------------------------------------------------


def lightness(colour: str) -> int:
    """Of "rgb(18, 20, 22)" the sum of the parts."""
    return sum(int(part) for part in colour.strip("rgb()").split(","))


def test_dark_follows_the_system_and_the_button(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="light")
    assert lightness(browser.style("body", "backgroundColor")) > 700
    browser.open(page, scheme="dark")
    assert lightness(browser.style("body", "backgroundColor")) < 100
    assert lightness(browser.style("body", "color")) > 600
    button = browser.find("#theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.send_keys(Keys.ENTER)
    assert lightness(browser.style("body", "backgroundColor")) > 700
    assert button.get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_sticks_out_at_the_side(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.run("return document.documentElement.scrollWidth") == width
    browser.run("document.querySelector('.card').click()")
    viewer, stage, buttons = (
        browser.run("return document.querySelector(arguments[0]).getBoundingClientRect()", selector)
        for selector in ("#viewer", "#stage", ".buttons")
    )
    for part in (viewer, stage, buttons):
        assert part["left"] >= 0
        assert part["right"] <= width
    assert stage["width"] / stage["height"] == pytest.approx(4 / 3, rel=0.4)


def test_little_motion_where_little_is_wanted(browser: Browser, page: Path) -> None:
    browser.open(page, motion="no-preference")
    assert browser.style("html", "scrollBehavior") == "smooth"
    browser.open(page, motion="reduce")
    assert browser.style("html", "scrollBehavior") == "auto"


def test_controls_have_names_and_the_outline_is_whole(browser: Browser, page: Path) -> None:
    browser.open(page, hash="#picture-1")
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(
                node["name"]["value"] if "name" in node else ""
            )
    assert {"Previous picture", "Next picture", "Close"} <= set(roles["button"])
    assert roles["dialog"] == ["picture 1"]
    for role in ("button", "checkbox", "slider"):
        assert all(roles[role]), role
    browser.press(Keys.ESCAPE)
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    for node in tree:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in ("button", "combobox", "radio", "link", "searchbox"):
            assert node["name"]["value"], node


# --- Many pictures ------------------------------------------------------------------------------


def test_of_5000_pictures_few_are_loaded(browser: Browser, large_page: Path) -> None:
    browser.open(large_page)
    assert browser.find("#count").text == "5,000 pictures"
    # They lie far below.
    assert browser.num_loaded() < 20
    browser.run("document.getElementById('gallery').scrollIntoView({behavior: 'instant'})")
    browser.wait_for(lambda: browser.num_loaded() >= 10)
    for _ in range(5):
        before = len(browser.texts(".card"))
        browser.run("scrollTo({top: document.body.scrollHeight, behavior: 'instant'})")
        browser.wait_for(lambda before=before: len(browser.texts(".card")) > before)
    assert browser.num_loaded() < 1000
    assert len(browser.texts(".card")) < 1000

    Select(browser.find("#order")).select_by_value("name")
    assert browser.texts(".card .name")[:3] == ["picture 0", "picture 1", "picture 2"]
    browser.find("#search").send_keys("4999")
    browser.wait_for(lambda: browser.find("#count").text == "1 of 5,000 pictures")
    browser.find(".card").click()
    assert browser.find("#viewer-name").text == "picture 4999"


def test_leafing_on_reaches_pictures_without_a_card(browser: Browser, large_page: Path) -> None:
    browser.open(large_page)
    Select(browser.find("#order")).select_by_value("name")
    browser.run("location.hash = '#picture-3000'")
    browser.wait_for(lambda: browser.viewer_open)
    browser.press(Keys.ARROW_RIGHT, Keys.ESCAPE)
    browser.wait_for(
        lambda: "picture 3001" in browser.run("return document.activeElement.textContent")
    )
