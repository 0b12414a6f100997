# SPDX-License-Identifier: Apache-2.0
"""The page: what is where, and what happens when."""

import os
from typing import Any


# Before gradio is imported, which reads it once: nothing is told to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from . import markup, pictures
from .model import Look, PhotoError, Viewer


TOP = 5
ROLLOUT, MEAN = "Rollout", "All heads"
WELCOME = "Drop a photo, paste one, or use the camera: here come the classes, and what the model looks at."
NO_MAPS = "This model has no attention from patches to patches that could be shown."
# Photos of visitors are deleted after so many seconds.
KEPT = 3600


def build(viewer: Viewer) -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title=viewer.name, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(markup.heading(viewer.name, viewer.facts()))
        look = gr.State(None, time_to_live=KEPT)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                photo = gr.Image(label="Photo", type="filepath", image_mode=None, height=380, buttons=[])
                photo.preprocess = uploaded
            with gr.Column(min_width=300):
                scores = gr.HTML(markup.note(WELCOME))
        with gr.Column(visible=False) as looking:
            with gr.Row(equal_height=False):
                with gr.Column(min_width=300):
                    seen = gr.Image(label="Where it looks", interactive=False, format="webp", buttons=["download"])
                with gr.Column(min_width=300):
                    layer = gr.Slider(1, 2, 2, step=1, label="Layer")
                    head = gr.Radio([ROLLOUT], value=ROLLOUT, label="Attention of")
                    caption = gr.HTML()
        shown = [look, scores, looking, layer, head, seen, caption]
        photo.input(
            lambda file: see(viewer, file), photo, [photo, *shown], concurrency_id="model", api_visibility="private"
        )
        gr.on(
            [layer.change, head.change], draw, [look, layer, head], [seen, caption], show_progress="hidden",
            trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip
    return page


def uploaded(payload: Any) -> tuple[str, str] | None:
    """Path and name of an upload. gr.Image's own step opens it, and of a broken file says nothing that helps."""
    if payload is None or payload.path is None:
        return None
    return payload.path, payload.orig_name or os.path.basename(payload.path)


def see(viewer: Viewer, file: tuple[str, str] | None) -> list[Any]:
    """The page for a photo: new values of photo, look, scores, looking, layer, head, seen and caption."""
    hidden = [gr.Column(visible=False), gr.skip(), gr.skip(), None, ""]
    if file is None:
        return [gr.skip(), None, markup.note(WELCOME), *hidden]
    path, name = file
    try:
        look = viewer.look(viewer.read(path, name), name)
    except PhotoError as error:
        return [None, None, markup.problem(str(error)), *hidden]
    scores = markup.bars(look.scores, TOP, viewer.is_probability)
    if look.rollout is None:
        return [gr.skip(), look, scores + markup.note(NO_MAPS), *hidden]
    layers, heads = look.heads.shape[:2]
    picture, caption = draw(look, layers, ROLLOUT)
    choices = [ROLLOUT, MEAN, *map(str, range(1, heads + 1))]
    layer = gr.Slider(maximum=layers, value=layers)
    return [
        gr.skip(), look, scores, gr.Column(visible=True), layer, gr.Radio(choices, value=ROLLOUT), picture, caption
    ]  # fmt: skip


def draw(look: Look | None, layer: int, head: str) -> tuple[Any, str]:
    """The photo, lit by a layer's rollout, by its heads together, or by one of them; and how to read it."""
    if look is None or look.rollout is None:
        return None, ""
    layer = min(int(layer), len(look.rollout))
    if head == ROLLOUT:
        weights, text = look.rollout[layer - 1], "How much of each patch is in what the model knows of the image"
        text += (
            f", by attention through layer {layer}." if layer == 1 else f", by attention through layers 1 to {layer}."
        )
    elif head == MEAN:
        weights, text = look.heads[layer - 1].mean(axis=0), f"Where layer {layer} looks, all heads together."
    else:
        weights, text = look.heads[layer - 1, int(head) - 1], f"Where head {head} of layer {layer} looks."
    return pictures.lit(look.photo, weights), markup.note(text)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Starts the server; `options` as gr.Blocks.launch has them."""
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return page.launch(theme=theme, css=markup.CSS, ssr_mode=False, footer_links=[], max_file_size="50mb", **options)
