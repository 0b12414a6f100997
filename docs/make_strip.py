# SPDX-License-Identifier: Apache-2.0
"""
Makes docs/pictures/strip.png, the picture at the top of README, from what the commands themselves draw:
`visualize.py rollout` on a photo that scikit-learn has, a figure of the digits model's card, and `app.py` in a browser.

    python docs/make_strip.py       needs the extras `plot` and `app`, playwright and Chromium
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright import sync_api
from sklearn.datasets import load_sample_images

from modeling_vit_scratch.page.layout import build, launch
from modeling_vit_scratch.page.model import load


ROOT = Path(__file__).parent.parent
MODEL = ROOT / "model_cards" / "vit-tiny-imagenet"
CARD_FIGURE = ROOT / "model_cards" / "digits" / "figures" / "learning_curves.png"
FLOWER = load_sample_images().filenames[1]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
LEFT, RIGHT, GAP, COLOURS = 700, 640, 20, 160


def attention(folder: Path) -> Image.Image:
    words = ["scripts/visualize.py", "rollout", str(MODEL), FLOWER, "--output", str(folder / "rollout.png")]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return Image.open(folder / "rollout.png")


def page(folder: Path) -> Image.Image:
    """The page after a click on the example."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    served = build(load(str(MODEL), trust_remote_code=True), examples=[FLOWER])
    _, url, _ = launch(served, prevent_thread_lock=True, quiet=True, allowed_paths=[FLOWER])
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder / "chromium", executable_path=chromium, args=FLAGS, viewport={"width": 1180, "height": 1060}
        )
        tab = context.new_page()
        tab.goto(url)
        tab.locator(".gallery button, .gallery-item, [class*=gallery] button").first.click()
        tab.locator(".bars").wait_for()
        tab.get_by_alt_text("A small map for each head, layers from top to bottom").wait_for()
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(3000)  # until pictures have faded in
        tab.screenshot(path=folder / "page.png")
        context.close()
    served.close(verbose=False)
    return Image.open(folder / "page.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        left = [attention(Path(folder)), Image.open(CARD_FIGURE)]
        left = [part.convert("RGB").resize((LEFT, LEFT * part.height // part.width), Image.LANCZOS) for part in left]
        right = page(Path(folder)).convert("RGB")
        right = right.resize((RIGHT, RIGHT * right.height // right.width), Image.LANCZOS)
    height = max(right.height, sum(part.height for part in left) + GAP)
    strip = Image.new("RGB", (LEFT + GAP + RIGHT, height), "white")
    strip.paste(left[0], (0, 0))
    strip.paste(left[1], (0, height - left[1].height))
    strip.paste(right, (LEFT + GAP, 0))
    file = ROOT / "docs" / "pictures" / "strip.png"
    strip.quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file} ({file.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
