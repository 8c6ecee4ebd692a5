"""The page in a real browser: `timm-selfdistill demo` as a program on loopback, and headless Chromium."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from timm_selfdistill.demo import stage_space
from timm_selfdistill.demo.picture import read_picture

from ..conftest import ENVIRONMENT, wait_for
from ..programs import HANGS, ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000
"""Milliseconds in which the page must do what it was asked to."""
WIDTHS = {1280: 900, 390: 844}
"""Of a desktop and a telephone, with their heights."""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    """Address of the page; the command ends when it is interrupted, as by Ctrl-C."""
    port = free_port()
    command = [sys.executable, "-m", "timm_selfdistill", "demo", "run", "--no-browser", "--port", str(port)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert select.select([process.stdout], [], [], HANGS)[0], "the page does not start"
        line = process.stdout.readline()
        assert line == f"run is served at http://127.0.0.1:{port}/; press Ctrl-C to stop\n"
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=HANGS) == 0
        assert process.stdout.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium does not start for root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS, ids="{} pixels wide".format)
def page(request, server, browser) -> Iterator:
    """The page, opened anew; it asks nothing of any other host, and no script of it fails."""
    context = browser.new_context(viewport={"width": request.param, "height": WIDTHS[request.param]})
    page = context.new_page()
    page.set_default_timeout(WAIT)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server)
    page.wait_for_selector("#picture input[type=file]", state="attached")
    yield page
    context.close()
    assert not errors
    assert [url for url in asked if not url.startswith((server, "data:", "blob:"))] == []


def test_a_port_that_is_taken_is_one_line(server, folder):
    port = server.rpartition(":")[2].strip("/")
    done = subprocess.run(
        [sys.executable, "-m", "timm_selfdistill", "demo", "run", "--no-browser", "--port", port],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 2
    assert done.stderr == f"timm-selfdistill: error: port {port} is taken; choose a free one with --port\n"


def test_the_app_of_a_space_serves_the_same_page(browser, folder, tmp_path):
    stage_space(folder / "run/best", tmp_path, folder / "run")
    port = free_port()
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "GRADIO_SERVER_NAME": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path, env=environment | {"GRADIO_SERVER_PORT": str(port)}
    )
    try:
        wait_for(lambda: process.poll() is not None or listens(port))
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/", timeout=WAIT)
        page.wait_for_selector("#picture input[type=file]", state="attached", timeout=WAIT)
        drop(page, folder / "noise.png")
        page.wait_for_selector(".sd-verdict[data-exit='2']", timeout=WAIT)
        page.close()
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def drop(page, path: Path) -> None:
    page.set_input_files("#picture input[type=file]", path)


def assert_it_fits(page, pictures: Path, name: str) -> None:
    """Nothing sticks out to the right; the screenshot is for whoever wants to look."""
    page.screenshot(path=pictures / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_a_picture_is_classified_and_the_slider_moves_its_exit(page, views, folder, tmp_path):
    assert page.locator("h1").inner_text() == "test_resnet"
    page.wait_for_selector(".sd-hint")
    drop(page, folder / "noise.png")
    page.wait_for_selector(".sd-verdict[data-exit='2']")  # by the calibrated thresholds
    assert page.locator(".sd-exits article").count() == 4
    assert "<b>bold</b> ${7*7} {{7*7}}" in page.locator(".sd-exits").inner_text()
    assert_it_fits(page, tmp_path, "calibrated")

    answers = views.classifier.answer(read_picture(folder / "noise.png", 3))
    for key, exit in (("Home", 0), ("End", 3)):
        page.locator("#threshold input[type=range]").press(key)
        page.wait_for_selector(f".sd-verdict[data-exit='{exit}']")
        assert not page.locator("#calibrated input").is_checked()
        share = views.classifier.leave(answers, 0.0 if key == "Home" else 1.0).share
        assert f"with {share:.0%} of the plain network's compute" in page.locator(".sd-verdict").inner_text()
        assert f"exit {exit}" in page.locator(".sd-taken h3").inner_text()
        assert_it_fits(page, tmp_path, f"exit-{exit}")
    page.locator("#calibrated input").check()
    page.wait_for_selector(".sd-verdict[data-exit='2']")


def test_files_that_are_no_picture_for_it_get_a_message(page, folder, tmp_path):
    for name, message in (
        ("notes.txt", "notes.txt is not a picture that can be read; drop a JPEG, PNG or WebP file"),
        ("large.png", "large.png has 50.0 megapixels (8000 x 6250); this page takes up to 25: make it smaller"),
    ):
        drop(page, folder / name)
        page.wait_for_selector(".sd-error")
        assert page.get_by_role("alert").inner_text().startswith(message)
        assert_it_fits(page, tmp_path, name)
        page.locator("#picture").get_by_label("Clear").click()
        page.wait_for_selector(".sd-hint")
    drop(page, folder / "noise.png")
    page.wait_for_selector(".sd-verdict")


def test_the_second_tab_shows_the_curve_and_the_gallery(page, tmp_path):
    page.get_by_role("tab", name="The model").click()
    page.locator(".sd-chart svg").wait_for(state="visible")
    assert page.locator(".sd-chart circle").count() == 5
    assert page.locator(".sd-model tbody tr").count() == 5
    assert page.locator(".sd-gallery img").is_visible()
    assert_it_fits(page, tmp_path, "model")
