"""What the tests know of the Scaling page."""

from playwright.sync_api import Page

from jepa_cluster.report import html, payload
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.trial.directory import Root

TOKEN = "token+of/the=tests"  # of `jepa ui`; tabs send it with every request
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SETTLED = """
    Number(document.body.dataset.ready || 0) > {after}
    && document.body.dataset.settled === '1'
"""


def drawn(page: Page, after: int = 0) -> int:
    """Wait for a drawing later than `after` with no request pending. Returns its number."""
    page.wait_for_function(SETTLED.format(after=after))
    return int(page.evaluate("document.body.dataset.ready"))


def write(root: Root, study: Analysis) -> str:
    """Write the page as `jepa report` does, without the PNG. Returns its address."""
    document = payload.add_curves(study.sweep, payload.build(study.sweep, study.error))
    path = root.sweep(study.sweep.name).path / "scaling.html"
    path.write_text(html.render(document))
    return f"file://{path}"
