"""Headless Chromium, and pages that fail the test on script errors and requests to other hosts."""

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright import sync_api as api
from scaling_page import BEARER

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120_000  # ms; the machine may be busy
OWN_ADDRESS = re.compile(r"(http://127\.0\.0\.1|file:|data:|blob:)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that drive Chromium where it is missing, unless it is required."""
    missing = CHROMIUM is None and not os.environ.get("JEPA_REQUIRE_BROWSER")
    reason = "needs, as root: apt-get install --no-install-recommends chromium"
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skipif(missing, reason=reason))


@pytest.fixture(scope="session")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def only_tab(browser: api.Browser) -> api.Page:
    """A tab for all tests: Chromium compiles Plotly once for it, and for a new tab again."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    return page


@pytest.fixture
def tab(only_tab: api.Page) -> Iterator[api.Page]:
    """An empty tab. Script errors and requests to other hosts fail the test."""
    page = only_tab
    page.set_viewport_size({"width": 1500, "height": 1000})
    page.emulate_media(color_scheme="null")
    page.context.clear_cookies()
    page.context.set_extra_http_headers(BEARER)
    page.goto("about:blank")
    faults: list[str] = []

    def note_request(request: api.Request) -> None:
        if not OWN_ADDRESS.match(request.url):
            faults.append(request.url)

    def note_error(error: api.Error) -> None:
        faults.append(str(error))

    page.on("pageerror", note_error)
    page.on("request", note_request)
    yield page
    page.unroute_all(behavior="ignoreErrors")
    page.remove_listener("pageerror", note_error)
    page.remove_listener("request", note_request)
    assert not [fault for fault in faults if "ajax-api" not in fault], faults
