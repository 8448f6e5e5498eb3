"""Take pictures of pages with a Chromium: `python docs/site/screenshots.py OUT PAGE.html ...`.

Each picture has four views of a page: light above dark, on a screen and on a phone. They are to be looked at by people.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

SCHEMES = {"light": 1, "dark": 0}
"""How Blink numbers what a reader prefers, from the top of the picture."""
SCREEN, PHONE, HEIGHT, GAP = 1180, 360, 900, 20
SHOWN = 2 / 3
"""Of its size, in the picture."""
COLORS = 128
FRAME = '<body style="margin:0"><iframe src="{}" style="width:{}px;height:{}px;border:0"></iframe></body>'
"""A window is never as narrow as a phone; a frame may be."""


def take(url: str, width: int, scheme: int, folder: Path) -> Image.Image:
    """A view of a page, so many pixels wide."""
    file, frame = folder / "view.png", folder / "frame.html"
    frame.write_text(FRAME.format(url, width, HEIGHT))
    command = [
        "chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files",
        f"--user-data-dir={folder}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={file}", frame.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(file) as taken:
        return taken.convert("RGB").crop((0, 0, width, HEIGHT))


def sheet(page: Path) -> Image.Image:
    """The four views of a page."""
    width, height = SCREEN + GAP + PHONE, 2 * HEIGHT + GAP
    found = Image.new("RGB", (width, height), "#888888")
    with TemporaryDirectory() as folder:
        for row, scheme in enumerate(SCHEMES.values()):
            for left, across in ((0, SCREEN), (SCREEN + GAP, PHONE)):
                found.paste(take(page.resolve().as_uri(), across, scheme, Path(folder)), (left, row * (HEIGHT + GAP)))
    small = found.resize((round(SHOWN * width), round(SHOWN * height)), Image.Resampling.LANCZOS)
    return small.quantize(COLORS, dither=Image.Dither.NONE)


def main(out: Path, pages: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for page in pages:
        sheet(page).save(out / f"{page.stem}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]])
