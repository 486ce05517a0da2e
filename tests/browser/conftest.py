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


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser: api.Browser) -> Iterator[api.Page]:
    """A page whose script errors and requests to other hosts fail the test."""
    page = browser.new_page(viewport={"width": 1500, "height": 1000}, extra_http_headers=BEARER)
    page.set_default_timeout(PATIENCE)
    faults: list[str] = []

    def note_request(request: api.Request) -> None:
        if not OWN_ADDRESS.match(request.url):
            faults.append(request.url)

    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", note_request)
    yield page
    page.close()
    assert not [fault for fault in faults if "ajax-api" not in fault], faults
