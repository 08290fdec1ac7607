"""A real browser at the viewer of a real training: pictures on the screen, and a slider that reaches the next step."""

import contextlib
import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import box_room
import matplotlib
import numpy as np
import psutil
import pytest
import torch
from commands import environment
from PIL import Image

from diffusionerf_ns.viewer import CPU_RESOLUTION

PATIENCE = 400.0  # seconds: a browser without a GPU beside a training, on two busy cores
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--window-size=900,600",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",  # the viewer's logo is elsewhere
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
]


def eventually(get: Callable[[], Any], what: str | Callable[[], str], seconds: float = PATIENCE) -> Any:
    """The first true value of a function; fails with ``what`` after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        value = get()
        if isinstance(value, np.ndarray) or value:
            return value
        assert time.monotonic() < end, f"not within {seconds:g} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.5)


class Training:
    """`ns-train` in a process of its own, its viewer at the port after one that is in use; `wait` until it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "out" / "e" / "diffusionerf-tiny" / "t"
        self.output = folder / "output.txt"
        self._taken = socket.socket()
        self._taken.bind(("0.0.0.0", 0))
        self._taken.listen()
        self.wanted = self._taken.getsockname()[1]
        # fmt: off
        command = [
            Path(sys.executable).parent / "ns-train", "diffusionerf-tiny",
            "--data", box_room.write_transforms(folder / "box"), "--output-dir", folder / "out",
            "--experiment-name", "e", "--timestamp", "t", "--viewer.websocket-port", self.wanted,
            *(flag for name in ("max-num-iterations", "steps-per-save", "steps-per-eval-batch", "steps-per-eval-image")
              for flag in (f"--{name}", 100_000)),
            "--pipeline.model.prior", box_room.write_prior(folder / "prior"), "--pipeline.model.patch-size", 16,
            # A weak score, as it is noise, and a small scene, as it is to be seen soon.
            "--pipeline.model.score-weight", 0.01, "--pipeline.model.refine-tau", 0.0,
            "--pipeline.model.metric-scale-warmup", 0.0, "--pipeline.datamanager.train-num-rays-per-batch", 256,
            "--pipeline.model.num-levels", 6, "--pipeline.model.max-res", 256, "--pipeline.model.levels-start", 1.0,
            "--pipeline.model.num-nerf-samples-per-ray", 16, "--pipeline.model.eval-samples-factor", 1,
        ]
        # fmt: on
        self._command = list(map(str, command))
        self._start()

    def _start(self) -> None:
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                self._command, stdout=file, stderr=file, env=environment(self.folder), cwd=self.folder
            )

    def wait(self) -> str:
        """The address of the viewer, once it answers."""
        said = eventually(self._said_port, "the viewer says that its port is in use and which it takes")
        address = f"http://localhost:{said}/"
        eventually(lambda: self._answers(address), f"{address} answers")
        return address

    def _said_port(self) -> str | None:
        if self.process.poll() is not None:
            # viser looks at all processes of the machine when it starts, and fails where one ends meanwhile
            assert "NoSuchProcess" in self.output.read_text(), self.output.read_text()[-3000:]
            self._start()
        found = re.search(rf"Port {self.wanted} is in use: the viewer is at port (\d+)", self.output.read_text())
        return found and found[1]

    @staticmethod
    def _answers(address: str) -> bool:
        try:
            return urllib.request.urlopen(address, timeout=10).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a TensorBoard curve."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.run))
        events.Reload()
        return [(e.step, e.value) for e in events.Scalars(name)] if name in events.Tags()["scalars"] else []

    def last_step(self) -> int:
        return max((step for step, _ in self.curve("Train Loss")), default=-1)

    def last(self, metric: str) -> float:
        """Last value of a curve of training; NaN before the first."""
        return next((value for _, value in reversed(self.curve(f"Train Metrics Dict/{metric}"))), float("nan"))

    def surfaces(self) -> tuple[float, float]:
        """Near and far of what stereo said that it found, a little wider."""
        near, far = re.search(r"at depths of (\S+) to (\S+) scene units", self.output.read_text()).groups()
        return 0.9 * float(near), 1.1 * float(far)

    def changes(self) -> str:
        from diffusionerf_ns.viewer import LOG_FILE  # here, so that the training starts meanwhile

        file = self.run / LOG_FILE
        return file.read_text() if file.exists() else ""

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        self._taken.close()


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Iterator[Training]:
    browser()  # skips before anything is started
    started = Training(tmp_path_factory.mktemp("viewer"))
    yield started
    started.stop()


def browser() -> tuple[str, str]:
    """Paths of Chromium and its driver."""
    pytest.importorskip("selenium", reason="selenium is not installed (pip install -e '.[dev]')")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver here (apt-get install chromium chromium-driver)")
    return chromium, driver


class Page:
    """The viewer in a browser, used as a person would: by labels, keys and the mouse."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        chromium, driver = browser()
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        options.page_load_strategy = "eager"
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.driver.set_page_load_timeout(PATIENCE)
        self.driver.set_script_timeout(PATIENCE)

    def open(self, address: str) -> None:
        """Open the viewer and wait until it shows a rendering."""
        self.driver.get(address)
        eventually(self.resolution, "a rendering")

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def resolution(self) -> tuple[int, int] | None:
        found = re.search(r"Resolution: (\d+)x(\d+)px", self.text())
        size = (int(found[1]), int(found[2])) if found else (0, 0)
        return size if size[0] > 0 else None

    def labelled(self, label: str) -> Any:
        """The input, or the root of the slider, that a label stands before."""
        from selenium.webdriver.common.by import By

        name = eventually(
            lambda: next(iter(self.driver.find_elements(By.XPATH, f"//label[normalize-space()='{label}']")), None),
            f"label {label}",
        ).get_attribute("for")
        found = self.driver.find_element(By.ID, name)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        return found

    def button(self, label: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.XPATH, f"//button[contains(., '{label}')]").click()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Training stands still meanwhile, and goes on whatever happens."""
        self.button("Pause Training")
        try:
            yield
        finally:
            self.button("Resume Training")

    def press(self, label: str, *keys: str) -> float:
        """Press keys on a slider; gives the value that it then shows."""
        from selenium.webdriver.common.by import By

        thumb = self.labelled(label).find_element(By.CSS_SELECTOR, "[role=slider]")
        for key in keys:
            thumb.send_keys(key)
            time.sleep(0.3)
        return float(thumb.get_attribute("aria-valuenow"))

    def choose(self, label: str, option: str) -> None:
        """Choose an option of a list."""
        from selenium.webdriver.common.by import By

        self.labelled(label).click()
        there = f"//*[@role='option'][normalize-space()='{option}']"
        eventually(lambda: next(iter(self.driver.find_elements(By.XPATH, there)), None), f"option {option}").click()

    def drag(self, dx: int, dy: int) -> None:
        """Drag the scene with the mouse: the camera goes around."""
        from selenium.webdriver.common.action_chains import ActionChains

        canvas = self.driver.find_element("css selector", "canvas")
        ActionChains(self.driver).move_to_element_with_offset(canvas, -50, 20).click_and_hold().move_by_offset(
            dx // 2, dy // 2
        ).move_by_offset(dx // 2, dy // 2).release().perform()

    def picture(self) -> np.ndarray:
        """What the screen shows of the scene, [h, w, 3] in [0, 1], without the panel and the axes."""
        with Image.open(io.BytesIO(eventually(self._screenshot, "a screenshot"))) as shot:
            pixels = np.asarray(shot.convert("RGB"), dtype=np.float32) / 255.0
        return pixels[70:390, 10:560]

    def picture_at_rest(self) -> np.ndarray | None:
        """What the screen shows, if it shows the same a moment later."""
        shot = self.picture()
        time.sleep(1.0)
        return shot if differs(shot, self.picture()) < 1e-3 else None

    def _screenshot(self) -> bytes | None:
        from selenium.common.exceptions import TimeoutException

        try:
            return self.driver.get_screenshot_as_png()
        except TimeoutException:  # the driver gives a busy page 10 seconds, whatever it is told
            return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.driver.quit()

    def kill(self) -> None:
        """End the browser without a word to the viewer."""
        driver = psutil.Process(self.driver.service.process.pid)
        for process in [*driver.children(recursive=True), driver]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def page(training, tmp_path_factory) -> Iterator[Page]:
    opened = Page(tmp_path_factory.mktemp("browser"))
    opened.open(training.wait())
    yield opened
    opened.close()


def share_of_depth_colours(picture: np.ndarray) -> float:
    """Share of pixels whose colour is one of those that depth is drawn in: turbo, paler where some light passes."""
    turbo = np.asarray(matplotlib.colormaps["turbo"].colors)[::4]
    palette = np.concatenate([a * turbo + 1.0 - a for a in (1.0, 0.9, 0.8)])
    pixels = picture[::8, ::8].reshape(-1, 1, 3)
    return float((np.abs(pixels - palette).max(-1).min(-1) < 0.06).mean())


def variation(picture: np.ndarray) -> float:
    """How far apart the colours of most pixels are: 0 for a blank picture, also with some lines drawn on it."""
    low, high = np.quantile(picture, (0.1, 0.9), axis=(0, 1))
    return float((high - low).max())


def differs(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_depth_is_shown_in_the_browser_while_training_and_follows_the_camera(training, page):
    assert page.press("Max res") == CPU_RESOLUTION or torch.cuda.is_available()
    page.press("Max res", *["\ue011"])  # Home: 64 pixels, as the machine may be slow
    page.button("Hide Train Cams")
    # Before that, all depth lies in front of the scene, and its picture is rightly of one colour.
    near, far = training.surfaces()
    eventually(lambda: near < training.last("depth_q05") < training.last("depth_q95") < far, "the scene's depth")
    before = page.picture()

    page.choose("Output type", "MedianDepth")
    depth = eventually(
        lambda: variation(shot := page.picture()) > 0.15 and share_of_depth_colours(shot) > 0.7 and shot,
        "a picture in the colours of depth that is not blank",
    )
    assert differs(depth, before) > 0.05, "depth is not the colour image"
    assert share_of_depth_colours(before) < share_of_depth_colours(depth)
    assert training.process.poll() is None

    with page.paused():  # now nothing but the camera can change the picture
        still = eventually(page.picture_at_rest, "a picture that stays the same")
        assert variation(still) > 0.1, "depth's colours span what is seen"
        changes = []

        def another() -> np.ndarray | None:
            if (shot := page.picture_at_rest()) is None:
                return None
            changes.append(differs(shot, still))
            return shot if changes[-1] > 0.02 else None

        def dragged() -> np.ndarray | None:
            page.drag(60, 10)  # a browser that is short of processor may lose a drag
            end = time.monotonic() + 60.0
            while time.monotonic() < end:
                if (shot := another()) is not None:
                    return shot
            return None

        moved = eventually(dragged, lambda: f"another depth image after the camera moved; seen to change by {changes}")
        assert share_of_depth_colours(moved) > 0.6


def test_a_slider_moved_in_the_browser_arrives_in_the_training(training, page):
    box = page.labelled("Fixed tau")
    page.driver.execute_script("arguments[0].click()", box)
    value = page.press("Tau", *["\ue014"] * 5)  # arrow right
    assert value > 0.1
    eventually(lambda: f"-> {value}" in training.changes(), f"the log tells of tau {value}")
    step = int(re.findall(r"after step (\d+): tau_fixed", training.changes())[-1])
    curve = eventually(
        lambda: [v for s, v in training.curve("Train Metrics Dict/tau") if s > step] or None, "steps after the change"
    )
    np.testing.assert_allclose(curve, value, rtol=1e-5)


def test_the_panel_shows_the_last_patch(page):
    eventually(lambda: "the prior's clean" in page.text(), "the patch of a step")
    shown = page.driver.execute_script(
        "return [...document.images].filter(i => i.src.startsWith('data:image/png')).map(i => i.naturalWidth)"
    )
    assert 6 * 16 in shown, "four tiles of 16 pixels, thrice enlarged"


def test_curves_of_all_terms_are_logged(training):
    eventually(lambda: training.last_step() >= 10, "ten steps")
    for name in ("depth_q05", "depth_q50", "depth_q95", "tau", "metric_scale", "score_depth_rms", "score_rgb_rms"):
        values = [v for _, v in training.curve(f"Train Metrics Dict/{name}")]
        assert values, name
        assert np.isfinite(values).all(), name
    for name in ("rgb_loss", "score_loss", "foreground_loss", "frustum_loss"):
        assert training.curve(f"Train Loss Dict/{name}"), name


def test_training_goes_on_when_the_browser_dies_in_the_middle_and_another_may_come(training, page, tmp_path):
    closed = training.output.read_text().count("Connection closed (")
    page.drag(-60, 30)  # a rendering is under way now
    page.kill()
    eventually(lambda: training.output.read_text().count("Connection closed (") > closed, "the connection is closed")
    step = training.last_step()
    eventually(lambda: training.last_step() >= step + 10, "ten more steps")
    other = Page(tmp_path)
    try:
        other.open(training.wait())
        eventually(lambda: variation(other.picture()) > 0.15, "a picture that is not blank")
    finally:
        other.close()
    assert training.process.poll() is None
    assert "Traceback" not in training.output.read_text()
