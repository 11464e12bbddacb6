"""Draw the README's pictures anew: the timeline and, in a headless Chromium, the report of the demo; and, given folders of
the finished studies deep_linear and opposing_signals, what they found, from the data that they left.

    python scripts/pictures.py [DEEP_LINEAR OPPOSING_SIGNALS]
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import xarray as xr
from bench_report import CHROMIUM
from playwright.sync_api import sync_playwright

import attrib
from attrib.report import figures, panels
from attrib.report.article import STYLE
from attrib.studies.demo import demo

OUT = Path(__file__).parent / "pictures"
WINDOW = (500, 800)  # steps: while it learns to generalise


def draw_demo() -> None:
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


def draw_studies(deep_linear: Path, opposing_signals: Path) -> None:
    who, curve = (_data(deep_linear, name) for name in ("illusion by item", "illusion"))
    losses = _data(opposing_signals, "group losses")
    with plt.rc_context({**STYLE, "axes.prop_cycle": plt.cycler(color=figures.COLOURS)}):
        figure = plt.figure(figsize=(10, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1)
        belief = curve.sel(network="aligned").isel(seed=0, drop=True).drop_vars("network").dropna("step")
        panels.stack(above, who, belief)
        panels.curves(below, losses, "step", "group")
        figure.savefig(OUT / "studies.png", dpi=110)


def _data(folder: Path, name: str) -> xr.DataArray:
    return xr.DataArray.from_dict(json.loads((folder / "data" / f"{name}.json").read_text())).astype(float)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    draw_demo()
    if sys.argv[1:]:
        draw_studies(*map(Path, sys.argv[1:]))
