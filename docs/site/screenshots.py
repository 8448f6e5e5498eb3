"""Take pictures of the built site with a Chromium: `python docs/site/screenshots.py build/docs build/screenshots`.

Each page is taken light and dark, 1280 pixels wide and, as on a phone, 360. They are to be looked at by people.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PAGES = ("docs/index", "README", "docs/how-it-works", "docs/leaderboard", "docs/metrics", "docs/reference/python")
SCHEMES = {"dark": 0, "light": 1}
"""How Blink numbers what a reader prefers."""
PHONE = '<body style="margin:0"><iframe src="{}" style="width:360px;height:1000px;border:0"></iframe></body>'
"""A window is never as narrow as a phone; a frame may be."""


def take(url: str, file: Path, width: int, scheme: int, profile: str) -> None:
    command = [
        "chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files",
        f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},1000", f"--screenshot={file}", url,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(site: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        for page in PAGES:
            url = (site / f"{page}.html").resolve().as_uri()
            phone = Path(folder, "phone.html")
            phone.write_text(PHONE.format(url))
            for name, scheme in SCHEMES.items():
                stem = page.replace("/", "-")
                take(url, (out / f"{stem}-{name}.png").resolve(), 1280, scheme, folder)
                take(phone.as_uri(), (out / f"{stem}-{name}-phone.png").resolve(), 500, scheme, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
