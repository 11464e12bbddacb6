"""Draw the README's two pictures anew, from the demo: the timeline, and the report in a headless Chromium."""

from pathlib import Path
from tempfile import TemporaryDirectory

from bench_report import CHROMIUM
from playwright.sync_api import sync_playwright

import attrib
from attrib.report import figures
from attrib.studies.demo import demo

OUT = Path(__file__).parent / "pictures"
WINDOW = (500, 800)  # steps: while it learns to generalise


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, sync_playwright() as play:
        demo(Path(folder))
        result = attrib.open_result(Path(folder) / "result.zarr")
        figures.save(OUT / "timeline.png", lambda ax: figures.timeline(result, 0, ax), overwrite=True)
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1830})
        page.goto((Path(folder) / "report.html").as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        page.evaluate("(window) => chooseSteps(...window)", WINDOW)
        page.wait_for_timeout(500)
        page.screenshot(path=OUT / "report.png")
        browser.close()


if __name__ == "__main__":
    main()
