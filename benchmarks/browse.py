"""Claim: the Scaling page of a sweep of 1 000 trials can be used within two seconds.

    python benchmarks/browse.py --trials 1000        # s until points are seen, all is read
    python benchmarks/browse.py --pictures docs/img  # the docs' screenshots, of a small stub study

Stub trials with spools from a known law (5 sizes, 50 mask settings, 2 horizons, 2 seeds; one not
finished) are collected into a fresh SQLite store; `jepa ui` serves them; headless Chromium opens
the page in a fresh profile each time. Plotly first draws scaling.json of the parent run; what moved
since the document was written comes last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from playwright import sync_api as api
from support import fake_trials

from jepa_cluster.report import analysis, html
from jepa_cluster.results import tables
from jepa_cluster.tracking import sync
from jepa_cluster.trial.directory import Root

PICTURES = {  # name -> address, width, height, colours
    "scaling-effect": ("view=effect", 1440, 1200, "light"),
    "scaling-points": ("view=scatter", 1400, 900, "light"),
    "scaling-heat": ("view=heat&facet=model", 1400, 760, "dark"),
    "scaling-narrow": ("view=scatter&x=context_fraction&curves=0", 400, 1200, "dark"),
}


@contextmanager
def served(root: Root) -> Iterator[str]:
    """`jepa ui` over a root -> its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {
        "JEPA_ROOT": str(root.path)
    }
    log = root.path / "ui.log"
    with log.open("w") as out:
        words = [sys.executable, "-m", "jepa_cluster", "ui", "--no-token", "--port", str(port)]
        ui = subprocess.Popen(words, env=env, stdout=out, stderr=out)
    try:
        while "ready: " not in log.read_text():
            if ui.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/scaling/"
    finally:
        ui.send_signal(signal.SIGTERM)
        ui.wait(60)


def opened(
    browser: api.Browser, address: str, width: int, height: int, scheme: str
) -> tuple[api.Page, list[float]]:
    """A fresh page -> (it, seconds until points are seen, until all is read)."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.set_default_timeout(300_000)
    begun = time.monotonic()
    tab.goto(address)
    seconds: list[float] = []
    for mark in ("ready", "settled"):
        tab.wait_for_function(f"(d => d.{mark})(document.body.dataset)")
        seconds.append(time.monotonic() - begun)
    return tab, seconds


# Moves the pointer over 20 points. Returns the ms until the card shows another trial.
HOVER = """async () => {
    const points = [...document.querySelectorAll('.scatterlayer .point')];
    const found = [];
    for (let i = 0; i < 20; i++) {
        const box = points[Math.floor(i * points.length / 20)].getBoundingClientRect();
        const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true};
        const layer = document.elementFromPoint(at.clientX, at.clientY);
        const card = document.getElementById('trial'), before = card.textContent;
        const start = performance.now();
        layer?.dispatchEvent(new MouseEvent('mousemove', at));
        while (card.textContent === before && performance.now() - start < 500)
            await new Promise((done) => setTimeout(done, 1));
        if (card.textContent !== before) found.push(performance.now() - start);
        await new Promise((done) => setTimeout(done, 100));
    }
    return found;
}"""


def requests(tab: api.Page) -> list[str]:
    """What the page asked for: ms from the start to the request and to the end of its answer,
    KB, address.
    """
    fields = "[e.startTime, e.responseEnd, e.transferSize / 1e3, e.name]"
    entries = tab.evaluate(f"performance.getEntriesByType('resource').map((e) => {fields})")
    return [
        f"{a:7.0f} {b:7.0f} ms {kb:7.0f} KB  {name.split('/', 3)[3][:80]}"
        for a, b, kb, name in entries
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--trials", type=int, default=1000)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--pictures", type=Path, metavar="FOLDER")
    a = p.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="jepa-browse-") as folder,
        api.sync_playwright() as playwright,
    ):
        root = Root(Path(folder))
        if a.pictures:
            some = {
                "scales": fake_trials.SCALES,
                "aspects": fake_trials.ASPECTS,
                "seeds": (0, 1, 2),
                "steps": (40, 360),
            }
            trials = fake_trials.sweep(root, **some)
        else:
            scales = [(0.05 + 0.004 * i, 0.1 + 0.004 * i) for i in range(max(a.trials // 20, 1))]
            trials = fake_trials.sweep(
                root, models=fake_trials.SIZES, scales=scales, seeds=(0, 1), steps=(40, 120)
            )
        for i, trial in enumerate(trials):
            stop = {"stop": 20, "kill": True} if i == 7 else {}
            fake_trials.run(trial, every=40, commit=120, **stop)
        sweep = tables.load(root, "demo")
        html.write(root, analysis.analyse(sweep))
        print(sync.sync(root), flush=True)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served(root) as address:
            if a.pictures:
                a.pictures.mkdir(parents=True, exist_ok=True)
                for name, (view, *shape) in PICTURES.items():
                    tab, _ = opened(browser, f"{address}#{view}", *shape)
                    tab.locator("#table tr").nth(2).focus()  # shows that trial
                    tab.evaluate(
                        "scrollTo(0, 0); "
                        "new Promise((r) => requestAnimationFrame(() => setTimeout(r, 500)))"
                    )
                    tab.screenshot(path=a.pictures / f"{name}.png")
                    tab.context.close()
            else:
                times: list[list[float]] = []
                asked: list[str] = []
                hovers: list[float] = []
                for _ in range(a.rounds):
                    tab, seconds = opened(browser, address, 1400, 900, "light")
                    times.append(seconds)
                    asked = requests(tab)
                    time.sleep(3)
                    hovers += tab.evaluate(HOVER)
                    tab.context.close()
                seen, whole = (statistics.median(t) for t in zip(*times, strict=True))
                print(f"{len(trials)} trials, s: points seen {seen:.2f}, all read {whole:.2f}; of")
                print("  " + ", ".join("/".join(f"{s:.2f}" for s in t) for t in times))
                print(
                    f"hover, ms: median {statistics.median(hovers):.0f}, longest {max(hovers):.0f} "
                    f"of {len(hovers)}"
                )
                print("\n".join(asked))
        browser.close()


if __name__ == "__main__":
    main()
