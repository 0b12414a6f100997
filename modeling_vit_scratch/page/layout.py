# SPDX-License-Identifier: Apache-2.0
"""The page: its components and events."""

import base64
import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any


# No telemetry; gradio reads this once, as it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from gradio import utils
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import pictures
from .model import Explanation, PhotoError, Viewer


FOLDER = Path(__file__).parent
HTML = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
markup: Any = HTML.get_template("markup.html").module
# Classes of a single photo, and of each photo in a table.
TOP, TOP_IN_TABLE = 5, 3
MAX_PHOTOS = 500
KEPT = 3600  # seconds, then visitors' photos are deleted
MAX_SESSIONS = 200  # visitors whose photo is kept, at 3.7 MB each: more forget the oldest
ROLLOUT, MEAN = "Rollout", "All heads"
# Browsers show these formats; of other files they get a copy.
SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")
WELCOME = [
    ("What is it?", "Drop a photo, paste one or use the camera: the most likely classes, with their scores."),
    ("Where does it look?", "Attention over your photo, layer by layer and head by head."),
    ("What does it see?", "The patches that the photo becomes, and what the model knows about their positions."),
]
LOOKS = (
    "Attention is what mixes the patches. A head says for each of them how much it counts; rollout follows that "
    "through the layers. It shows where information can have come from, not what speaks for a class."
)
HEADS = "Every head, from left to right; every layer, from top to bottom. Click on one to see it large."
SEES = "The photo in the model's own size. A Vision Transformer cuts it into patches: each becomes a token."
PLACES = (
    "How alike the position embeddings are: each tile stands for the patch at its position, and is bright where its "
    "embedding is like that of another patch."
)
PROGRESS = gr.Progress()
DROP = "# Drop a photo here\nor click to choose one"
NO_MAPS = "This model has no attention from patch to patch that could be shown."
FORGOTTEN = "Photos are deleted after an hour. Choose this one again to go on."
NOT_SHOWN = r"\A---\n.*?\n---\n|!\[.*?\]\(.*?\)"  # of a card: its metadata, and figures beside it
SEVERAL = f"Up to {MAX_PHOTOS} photos at once. Each is a row, and the table can be downloaded."


# The photo on the page, and the picture of all its heads.
Shown = tuple[Explanation, pictures.Overview]


def build(
    viewer: Viewer, link: str | None = None, examples: Sequence[str] = (), card: str = "", credit: str = ""
) -> gr.Blocks:
    """The page of a model, with a link to where it comes from, photos to try, and the Markdown of its card."""
    quiet = {"api_visibility": "private"}  # a page for people
    # gr.Image would open the file itself, and say nothing of a broken one that helps: `uploaded` takes its place.
    heavy = {"preprocess": False, "concurrency_id": "model", **quiet}
    with gr.Blocks(title=viewer.name, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(markup.heading(viewer.name, viewer.details(), link))
        with gr.Tab("One photo"):
            shown = gr.State(None, time_to_live=KEPT)
            with gr.Row():
                with gr.Column(min_width=300):
                    photo = gr.Image(label="Photo", alt_text="Your photo", height=400, buttons=[], placeholder=DROP)
                    if examples:
                        tried = gr.Dataset(
                            components=[gr.Image(visible=False)], samples=[[path] for path in examples],
                            type="index", label=f"Or try one of these{credit}",
                        )  # fmt: skip
                with gr.Column(min_width=300):
                    scores = gr.HTML(markup.welcome(WELCOME))
            with gr.Column(visible=False) as looking:
                gr.HTML(markup.title("Where it looks", LOOKS))
                with gr.Row():
                    with gr.Column(min_width=300):
                        seen = picture("The photo, bright where the model looks", ["download"])
                        caption = gr.HTML()
                    with gr.Column(min_width=300):
                        layer = gr.Slider(1, 2, 2, step=1, label="Layer", buttons=[])
                        head = gr.Radio([ROLLOUT], value=ROLLOUT, label="Attention of")
                        gr.HTML(markup.note(HEADS))
                        overview = picture("A small map for each head, layers from top to bottom")
            with gr.Row(visible=False) as seeing:
                with gr.Column(min_width=300):
                    gr.HTML(markup.title("What it sees", SEES))
                    patches = picture("The photo cut into patches", ["download"])
                with gr.Column(min_width=300, visible=False) as placing:
                    gr.HTML(markup.title("What it knows about positions", PLACES))
                    positions = picture("Similarity of position embeddings", ["download"])
        with gr.Tab("Several photos"):
            gr.HTML(markup.note(SEVERAL))
            files = gr.File(file_count="multiple", file_types=["image"], label="Photos", height=180)
            table = gr.HTML()
        if card:
            with gr.Accordion("Model card", open=False):
                gr.Markdown(re.sub(NOT_SHOWN, "", card, flags=re.DOTALL))

        drawn = [seen, overview, caption]
        outputs = [photo, shown, scores, looking, seeing, placing, layer, head, *drawn, patches, positions]
        if examples:
            tried.click(
                lambda index: see(viewer, (examples[index], PurePath(examples[index]).name)), tried, outputs,
                concurrency_id="model", **quiet,
            )  # fmt: skip
        photo.input(
            lambda payload: see(viewer, uploaded(payload)),
            photo,
            outputs,
            trigger_mode="multiple",  # people don't wait; each answer puts its own photo there
            **heavy,
        )
        quick = {"show_progress": "hidden", "trigger_mode": "always_last", **quiet}
        gr.on([layer.input, head.input], draw, [shown, layer, head], drawn, **quick)
        overview.select(choose, shown, [layer, head, *drawn], **quick)
        gr.on(
            [files.upload, files.delete, files.clear],
            lambda payloads, progress=PROGRESS: tabulate(viewer, list(map(uploaded, payloads or [])), progress),
            files,
            table,
            trigger_mode="always_last",
            **heavy,
        )
    return page


def picture(alt_text: str, buttons: list[str] | None = None) -> gr.Image:
    """A component for a picture that the page draws."""
    return gr.Image(alt_text=alt_text, show_label=False, interactive=False, format="webp", buttons=buttons or [])


def uploaded(payload: dict[str, Any] | None) -> tuple[str, str] | None:
    """Path and name of an upload. Browsers may send anything: a file outside the folder of uploads has no path."""
    if payload is None:
        return None
    path = str(payload.get("path"))
    name = str(payload.get("orig_name") or PurePath(path).name)
    return (path if utils.is_in_or_equal(path, utils.get_upload_folder()) else "", name)


def see(viewer: Viewer, file: tuple[str, str] | None) -> list[Any]:
    """New values of the outputs of `photo.input`: the results for a photo, or a message alone."""
    hidden = [gr.Column(visible=False), gr.Row(visible=False), gr.Column(visible=False)]
    unknown = [gr.skip(), gr.skip(), None, None, ""]  # slider and choice of a head, and what `draw` returns
    if file is None:
        return [None, None, markup.welcome(WELCOME), *hidden, *unknown, None, None]
    path, name = file
    try:
        image = viewer.read(path, name)
        explanation = viewer.explain(image, name)
    except PhotoError as error:
        return [None, None, markup.problem(str(error)), *hidden, *unknown, None, None]
    photo = path if name.lower().endswith(SHOWN_BY_BROWSERS) else image.convert("RGB")
    scores = markup.bars(explanation.scores[:TOP], viewer.is_probability)
    positions = None if explanation.positions is None else pictures.positions(explanation.positions)
    below = [gr.Row(visible=True), gr.Column(visible=positions is not None)]
    if explanation.rollout is None:
        patches = pictures.patches(explanation.pixels, None)
        return [photo, None, scores + markup.note(NO_MAPS), hidden[0], *below, *unknown, patches, positions]
    patches = pictures.patches(explanation.pixels, explanation.patch)
    shown = (explanation, pictures.Overview(explanation.photo, explanation.heads))
    layers, heads = explanation.heads.shape[:2]
    slider = gr.Slider(maximum=layers, value=layers, visible=layers > 1)
    choices = gr.Radio([ROLLOUT, MEAN, *map(str, range(1, heads + 1))], value=ROLLOUT)
    drawn = draw(shown, layers, ROLLOUT)
    return [photo, shown, scores, gr.Column(visible=True), *below, slider, choices, *drawn, patches, positions]


def draw(shown: Shown | None, layer: int, head: str) -> list[Any]:
    """The photo with the chosen map, the overview with this map framed, and a caption."""
    if shown is None:
        return [gr.skip(), gr.skip(), markup.note(FORGOTTEN)]
    explanation, overview = shown
    layer = min(int(layer), overview.layers)
    layers, index, heads = range(layer, layer + 1), None, explanation.heads
    if head == ROLLOUT:
        weights, layers = explanation.rollout[layer - 1], range(1, layer + 1)
        through = "layer 1" if layer == 1 else f"layers 1 to {layer}"
        text = f"Rollout: how much of each patch is in what stands for the image, by attention of {through}."
    elif head == MEAN:
        weights = heads[layer - 1].mean(axis=0)
        text = f"Layer {layer}: where its heads look, on average."
    else:
        index = int(head)
        weights = heads[layer - 1, index - 1]
        text = f"Layer {layer}, head {head}: where it looks."
    most = pictures.top(weights) / max(float(weights.mean()), 1e-30)
    caption = markup.note(text) + markup.scale(most)
    picture = pictures.heat(pictures.sized(explanation.photo, pictures.SIDE), weights)
    return [picture, overview.marked(layers, index), caption]


def choose(shown: Shown | None, event: gr.SelectData) -> list[Any]:
    """The head that was clicked on."""
    if shown is None:
        return [gr.skip()] * 5
    layer, head = shown[1].at(*event.index)
    return [layer, str(head), *draw(shown, layer, str(head))]


def tabulate(viewer: Viewer, files: list[tuple[str, str]], progress: Any = None) -> str:
    """The table of several photos; those that can't be read with the reason."""
    if not files:
        return ""
    rows, text = [], io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # the columns of scripts/predict.py, and problem
    count = min(TOP_IN_TABLE, viewer.config.num_labels)
    ends = ["", *(f"_{rank}" for rank in range(2, count + 1))]
    writer.writerow(["image", *(f"{name}{end}" for end in ends for name in ("label", "score")), "problem"])
    for path, name in progress.tqdm(files[:MAX_PHOTOS], unit="photos") if progress else files[:MAX_PHOTOS]:
        try:
            image = viewer.read(path, name)
            scores = viewer.classify(image, name)[:TOP_IN_TABLE]
            rows.append((name, pictures.thumbnail(image), scores))
            writer.writerow([name, *(cell for label, score in scores for cell in (label, f"{score:.6f}")), ""])
        except PhotoError as error:
            rows.append((name, "", str(error)))
            writer.writerow([name, *[""] * 2 * count, str(error)])
    link = f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.getvalue().encode()).decode()}"
    html = markup.table(rows, viewer.is_probability, link, f"{PurePath(viewer.name).name}.csv")
    left = len(files) - MAX_PHOTOS
    if left > 0:
        html += markup.problem(f"{left} more photos were left out: at most {MAX_PHOTOS} at once.")
    return html


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Starts the server with the options of gr.Blocks.launch. Fonts are the system's: none is downloaded."""
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500", block_label_text_color="*neutral_600")  # fmt: skip
    css = (FOLDER / "style.css").read_text(encoding="utf-8")
    options = {"state_session_capacity": MAX_SESSIONS, "max_file_size": "50mb", **options}
    return page.launch(theme=theme, css=css, ssr_mode=False, footer_links=[], **options)
