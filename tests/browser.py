"""A browser without a window, and what it makes of a page at a width."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --no-default-browser-check"
    " --disable-background-networking --disable-component-update --disable-sync --disable-extensions"
    " --disable-default-apps --disable-dev-shm-usage --hide-scrollbars --enable-logging=stderr --allow-file-access-from-files"
)


def find() -> str:
    """The path of a browser; without one the test is skipped, or fails where one is required."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        message = f"no browser: none of {', '.join(BROWSERS)} is installed (for instance: apt-get install chromium)"
        if os.environ.get("TWOFOUR_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return found


def ask(browser: str, page: Path, width: int, script: str) -> Any:
    """What the body of a function of `d`, the document of `page` in a frame of that width, returns as JSON."""
    frame = page.with_name("frame.html")
    frame.write_text(
        f"<iframe id=f src={page.name} width={width} height=800 style='border:0'></iframe><p id=answer></p><script>"
        f"function asked(d) {{ {script} }}"
        " onload = () => { const d = document.getElementById('f').contentDocument;"
        " document.getElementById('answer').textContent = JSON.stringify(asked(d)); }</script>",
        encoding="utf-8",
    )
    return json.loads(answer(browser, frame))


def answer(browser: str, page: Path, seconds: int = 4) -> str:
    """What stands in the element `answer` of a page after so many seconds of its own clock."""
    flags = [*FLAGS.split(), f"--user-data-dir={page.parent / 'profile'}", f"--virtual-time-budget={1000 * seconds}"]
    command = [browser, *flags, "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, encoding="utf-8")
    found = re.search(r'<p id="answer">(.+?)</p>', done.stdout)
    assert found, done.stdout[-300:]
    return html.unescape(found[1])
