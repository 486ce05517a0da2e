"""What the tests know of the Scaling page."""

from playwright.sync_api import Page

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
