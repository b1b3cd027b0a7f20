"""The page of a report in headless chromium."""

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
import PIL.Image
import pytest
from helpers.evaluation import smooth_case
from helpers.report import NoiseDataset, shape_of, smooth_result
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from segtrain.evaluation.bootstrap import compare
from segtrain.evaluation.metrics import image_ious
from segtrain.evaluation.report.gallery import Gallery
from segtrain.evaluation.report.page import write_report
from segtrain.evaluation.report.paths import image_path
from segtrain.evaluation.result import EvalResult
from segtrain.types import Image

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

NUM, MANY = 100, 5000
HOSTILE = "</script><img src=x onerror=alert(1)>.jpg"
# Seconds, enough for a slow machine.
TIMEOUT = 60
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """A web driver with helpers for the tests."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(
        self,
        page: Path,
        *,
        hash: str = "",
        width: int = 1280,
        scheme: str = "light",
        motion: str = "reduce",  # a click could miss a moving element
    ) -> None:
        """Load from a blank page: a change of the hash alone would not reload."""
        self.driver.get("about:blank")
        self.resize(width)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(page.as_uri() + hash)

    def resize(self, width: int, height: int = 900) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

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
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, "timed out"
            time.sleep(0.05)

    def num_loaded(self) -> int:
        """Number of loaded images."""
        script = "return [...document.images].filter(i => i.complete && i.naturalWidth).length"
        return int(self.run(script))

    @property
    def viewer_open(self) -> bool:
        return bool(self.run("return document.getElementById('viewer').open"))

    @property
    def console_messages(self) -> list[dict[str, Any]]:
        """Messages of the console since the last call."""
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    assert DRIVER is not None, "chromium needs chromedriver; install chromium-driver"
    service = Service(DRIVER, log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The shared browser; fails if the console got any message."""
    shared_browser.run("try { localStorage.clear() } catch {}")
    yield shared_browser
    assert shared_browser.console_messages == []


@pytest.fixture(scope="module")
def result() -> EvalResult:
    names = [f"image {index}" for index in range(NUM)]
    names[7] = HOSTILE
    records = smooth_result(NUM).totals.records
    # Compared with itself, so that no difference is significant.
    return smooth_result(NUM, names=names, comparison=compare(records, records))


@pytest.fixture(scope="module")
def page(result: EvalResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    gallery = Gallery(folder, NoiseDataset(NUM), result.totals.threshold)
    for index in range(NUM):
        gallery.add(index, *smooth_case(index, shape_of(index)))
    return write_report(folder, result)


@pytest.fixture(scope="module")
def large_page(result: EvalResult, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 images that share the files of a hundred."""
    folder = tmp_path_factory.mktemp("large")
    records = np.resize(result.totals.records, MANY)
    records["index"] = np.arange(MANY)
    for index in range(MANY):
        for kind in ("photo", "thumb", "truth", "prediction", "errors"):
            path = image_path(folder, index, kind)
            path.parent.mkdir(exist_ok=True)
            path.hardlink_to(image_path(page.parent, index % NUM, kind))
    large = replace(
        result,
        totals=replace(result.totals, records=records),
        image_ids=[f"image {index}" for index in range(MANY)],
    )
    return write_report(folder, large)


def names_by(values: "np.typing.ArrayLike", result: EvalResult) -> list[str]:
    """Names in ascending order of `values`; ties by index."""
    order = np.argsort(np.asarray(values), kind="stable")
    return [result.image_ids[at] for at in order]


# --- Loading --------------------------------------------------------------------------------------


def test_all_images_of_a_card_and_of_the_viewer_load(browser: Browser, page: Path) -> None:
    browser.open(page)
    card = browser.find(".card")
    browser.run("arguments[0].scrollIntoView()", card)
    images = "return [...document.querySelectorAll(arguments[0])].every(i => i.naturalWidth > 0)"
    browser.wait_for(lambda: browser.run(images, "#cards li:first-child img"))
    card.click()
    browser.wait_for(lambda: browser.run(images, "#stage img"))


def test_console_messages_are_noticed(shared_browser: Browser, page: Path) -> None:
    shared_browser.open(page)
    broken = page.with_name("broken.html")
    broken.write_text('<img src="images/none.jpg">')
    shared_browser.open(broken)
    shared_browser.wait_for(lambda: shared_browser.console_messages)


def test_names_are_inserted_as_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.find("#search").send_keys("script")
    browser.wait_for(lambda: browser.texts(".card .name") == [HOSTILE])
    browser.find(".card").click()
    assert browser.find("#viewer-name").text == HOSTILE
    assert browser.run("return document.querySelectorAll('[onerror], img[src=x]').length") == 0


# --- Order and filters ----------------------------------------------------------------------------


def test_images_are_sorted(browser: Browser, page: Path, result: EvalResult) -> None:
    records = result.totals.records
    frame = records["size"].prod(axis=1)
    ious = image_ious(records).round(6)
    false_negatives, false_positives = (
        records["confusion"][:, truth, predicted] / frame for truth, predicted in ((1, 0), (0, 1))
    )
    orders = {
        "best": -ious,
        "false-negatives": -false_negatives.round(6),
        "false-positives": -false_positives.round(6),
        "smallest": (records["confusion"][:, 1].sum(axis=1) / frame).round(6),
        "worst": ious,
    }
    browser.open(page)
    first = len(browser.texts(".card"))
    assert 0 < first < NUM
    assert browser.texts(".card .name") == names_by(ious, result)[:first]
    for name, values in orders.items():
        Select(browser.find("#order")).select_by_value(name)
        assert browser.texts(".card .name")[:first] == names_by(values, result)[:first], name
    Select(browser.find("#order")).select_by_value("name")
    numbered = [f"image {index}" for index in range(NUM) if index != 7]
    assert browser.texts(".card .name")[:first] == [HOSTILE, *numbered][:first]


def test_filters_count_and_combine(browser: Browser, page: Path, result: EvalResult) -> None:
    people = np.minimum(result.totals.records["num_people"], 3)
    touches = result.totals.records["touches_frame"]
    browser.open(page)
    assert browser.find("#count").text == f"{NUM} images"
    Select(browser.find("[data-filter='1']")).select_by_value("2")
    expected = int(np.count_nonzero(people == 2))
    assert 0 < expected < NUM
    assert browser.find("#count").text == f"{expected} of {NUM} images"
    Select(browser.find("[data-filter='2']")).select_by_value("0")
    both = np.flatnonzero((people == 2) & touches)
    assert browser.find("#count").text == f"{len(both)} of {NUM} images"
    assert set(browser.texts(".card .name")) == {result.image_ids[at] for at in both}

    browser.find("button[type=reset]").click()
    browser.wait_for(lambda: browser.find("#count").text == f"{NUM} images")
    assert browser.find("#count").get_attribute("aria-live") == "polite"


def test_a_link_in_the_slice_table_filters_the_gallery(browser: Browser, page: Path) -> None:
    browser.open(page)
    link = browser.find("a[data-group='4'][data-slice='1']")
    assert link.text == "there"
    browser.run("arguments[0].click()", link)
    assert browser.find("#count").text == f"{NUM // 2} of {NUM} images"


def test_the_selected_layer_is_shown_on_all_cards(browser: Browser, page: Path) -> None:
    browser.open(page)
    sources = "return [...document.querySelectorAll('.card .layer')].map(i => i.src.slice(-10))"
    assert set(browser.run(sources)) == {"errors.png"}
    browser.find("[name=layer][value=errors]").send_keys(Keys.ARROW_RIGHT)
    assert {source[-9:] for source in browser.run(sources)} == {"truth.png"}
    browser.find("[name=layer][value=truth]").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert browser.style(".card .layer", "display") == "none"


# --- Viewer ---------------------------------------------------------------------------------------


def test_the_keyboard_opens_navigates_and_closes_the_viewer(
    browser: Browser, page: Path, result: EvalResult
) -> None:
    worst = names_by(image_ious(result.totals.records).round(6), result)
    browser.open(page)
    # Start at the top of the page and press Tab only.
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
    index = result.image_ids.index(worst[2])
    assert browser.driver.current_url.endswith(f"#image-{index}")

    browser.press(Keys.ESCAPE)
    browser.wait_for(lambda: not browser.viewer_open)
    browser.wait_for(lambda: browser.run("return document.activeElement.matches('.card')"))
    assert worst[2] in browser.run("return document.activeElement.textContent")
    assert "#" not in browser.driver.current_url


def test_the_slider_moves_the_divider(browser: Browser, page: Path) -> None:
    browser.open(page, hash="#image-4")
    assert browser.viewer_open
    assert browser.find("#viewer-name").text == "image 4"
    slider = browser.find("#wipe")

    def clipped() -> tuple[float, float]:
        """Percent cut off the ground truth on the right and off the prediction on the left."""
        truth, prediction = (
            browser.style(f"#stage [data-kind={kind}]", "clipPath")
            for kind in ("truth", "prediction")
        )
        right = re.fullmatch(r"inset\(0px (?:calc\()?([\d.]+)%\)? 0px 0px\)", truth)
        left = re.fullmatch(r"inset\(0px 0px 0px ([\d.]+)%\)", prediction)
        assert right is not None, truth
        assert left is not None, prediction
        return float(right[1]), float(left[1])

    assert clipped() == (50, 50)
    slider.send_keys(*[Keys.ARROW_RIGHT] * 10)
    assert clipped() == (40, 60)
    # The arrow keys have not changed the image.
    assert browser.find("#viewer-name").text == "image 4"
    assert slider.get_attribute("aria-valuetext") == "ground truth in the left 60 percent"
    slider.send_keys(Keys.HOME)
    assert clipped() == (100, 0)
    slider.send_keys(Keys.END)
    assert clipped() == (0, 100)


def test_ground_truth_is_left_and_prediction_right_of_the_divider(
    browser: Browser, page: Path
) -> None:
    browser.open(page, hash="#image-0")
    loaded = "return [...document.querySelectorAll('#stage img')].every(i => i.naturalWidth > 0)"
    browser.wait_for(lambda: browser.run(loaded))

    def screenshots(*layers: str) -> tuple[Image, Image]:
        """Left and right of the divider, without the divider and the labels in the corners."""
        for box in browser.driver.find_elements(By.CSS_SELECTOR, "[data-layer]"):
            if box.is_selected() != (box.get_attribute("data-layer") in layers):
                box.send_keys(Keys.SPACE)
        png = io.BytesIO(browser.find("#stage").screenshot_as_png)
        pixels = np.asarray(PIL.Image.open(png).convert("RGB"))[60:]
        middle = pixels.shape[1] // 2
        return pixels[:, : middle - 8], pixels[:, middle + 8 :]

    bare, truth = screenshots(), screenshots("truth")
    prediction, errors = screenshots("prediction"), screenshots("errors")
    both = screenshots("truth", "prediction")
    equal = np.array_equal
    assert equal(both[0], truth[0])
    assert equal(both[1], prediction[1])
    assert equal(truth[1], bare[1])
    assert equal(prediction[0], bare[0])
    assert not equal(truth[0], bare[0])
    assert not equal(prediction[1], bare[1])
    assert not equal(errors[0], bare[0])
    assert not equal(errors[1], bare[1])


def test_the_viewer_opens_for_a_known_image_only(browser: Browser, page: Path) -> None:
    browser.open(page, hash=f"#image-{NUM}")
    assert not browser.viewer_open
    browser.run("location.hash = '#image-2'")
    browser.wait_for(lambda: browser.viewer_open)


# --- Layout and accessibility ---------------------------------------------------------------------


def lightness(color: str) -> int:
    """The sum of the channels of a color such as "rgb(18, 20, 22)"."""
    return sum(int(channel) for channel in color.strip("rgb()").split(","))


def test_the_theme_follows_the_system_and_the_button(browser: Browser, page: Path) -> None:
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
def test_nothing_overflows_horizontally(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.run("return document.documentElement.scrollWidth") == width
    browser.run("document.querySelector('.card').click()")
    viewer, stage, buttons = (
        browser.run("return document.querySelector(arguments[0]).getBoundingClientRect()", selector)
        for selector in ("#viewer", "#stage", ".buttons")
    )
    for rectangle in (viewer, stage, buttons):
        assert rectangle["left"] >= 0
        assert rectangle["right"] <= width
    assert stage["width"] / stage["height"] == pytest.approx(4 / 3, rel=0.4)


def test_reduced_motion_is_respected(browser: Browser, page: Path) -> None:
    browser.open(page, motion="no-preference")
    assert browser.style("html", "scrollBehavior") == "smooth"
    browser.open(page, motion="reduce")
    assert browser.style("html", "scrollBehavior") == "auto"


def test_all_controls_have_accessible_names(browser: Browser, page: Path) -> None:
    browser.open(page, hash="#image-1")
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(
                node["name"]["value"] if "name" in node else ""
            )
    assert {"Previous image", "Next image", "Close"} <= set(roles["button"])
    assert roles["dialog"] == ["image 1"]
    for role in ("button", "checkbox", "slider"):
        assert all(roles[role]), role
    browser.press(Keys.ESCAPE)
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    for node in tree:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in ("button", "combobox", "radio", "link", "searchbox"):
            assert node["name"]["value"], node


# --- Many images ----------------------------------------------------------------------------------


def test_few_of_5000_images_are_loaded(browser: Browser, large_page: Path) -> None:
    browser.open(large_page)
    assert browser.find("#count").text == "5,000 images"
    # The gallery is far below.
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
    assert browser.texts(".card .name")[:3] == ["image 0", "image 1", "image 2"]
    browser.find("#search").send_keys("4999")
    browser.wait_for(lambda: browser.find("#count").text == "1 of 5,000 images")
    browser.find(".card").click()
    assert browser.find("#viewer-name").text == "image 4999"


def test_navigation_reaches_images_without_a_card(browser: Browser, large_page: Path) -> None:
    browser.open(large_page)
    Select(browser.find("#order")).select_by_value("name")
    browser.run("location.hash = '#image-3000'")
    browser.wait_for(lambda: browser.viewer_open)
    browser.press(Keys.ARROW_RIGHT, Keys.ESCAPE)
    browser.wait_for(
        lambda: "image 3001" in browser.run("return document.activeElement.textContent")
    )
