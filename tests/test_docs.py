# SPDX-License-Identifier: Apache-2.0
"""The website builds without a warning and needs no network; its Python runs; pages in two languages are alike."""

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import class_folders, load_script
from transformers import ViTConfig

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.checkpoint.conversion import save_checkpoint
from modeling_vit_scratch.checkpoint.formats import FORMATS


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES]
TRANSLATED = [name for name in NAMES if name.startswith("zh/")]


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    (path.stem, line)
    for path in sorted((DOCS / "howto").glob("*.md"))
    for block in blocks(path, "bash")
    for line in block.splitlines()
]
# Written out and run in the test below; the others are held to the flags that their scripts have.
RUN = [
    ("fine_tune", "python scripts/finetune.py --train_dir photos --model", "Held-out accuracy"),
    ("pretrain", "python scripts/pretrain.py --train_dir photos --variant S/16 --objective mpp", "Held-out loss"),
    ("pretrain", "python scripts/finetune.py --model_name_or_path outputs/mae", "Held-out accuracy"),
    ("evaluate", "python scripts/evaluate.py outputs/pets photos", "Brier"),
    ("predict", "python scripts/predict.py outputs/pets photos --output", "labels.parquet"),
    ("convert", "python scripts/convert.py B_16.npz outputs/b16", "outputs/b16"),
    ("convert", "python scripts/convert.py outputs/b16", "b16_timm.safetensors"),
    ("visualize", "python scripts/visualize.py rollout", "rollout.png"),
    ("resolution", "python scripts/convert.py B_16.npz outputs/b8", "outputs/b8"),
    ("publish", "python scripts/card.py outputs/pets", "vit-pets"),
]
# What makes the commands short, and fit for the network and the photos of the test.
SHORTER = {
    "google/vit-base-patch16-224-in21k": "B_16.npz --max_steps 2",
    "--variant S/16": "--variant test/4 --max_steps 2",
    "outputs/mae ": "outputs/mpp --max_steps 2 ",
    "cat/0.jpg": "cat/0.png",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages. Any warning is an error: a missing class or function of the model file, a dead link, ..."""
    from sphinx.cmd.build import build_main

    folder, told = tmp_path_factory.mktemp("site"), io.StringIO()
    with contextlib.redirect_stderr(told):
        code = build_main(["-W", "--keep-going", "-q", "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")])
    assert code == 0, told.getvalue()
    return folder / "html"


def test_pages_need_nothing_from_elsewhere(site):
    for name in NAMES:
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', page) + re.findall(
            r'<link[^>]* href="([^"]+)"', page
        )
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))]
    assert not [css for css in site.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", css.read_text())]


def test_equations_have_the_numbers_of_the_paper(site):
    for name in (name for name in NAMES if name.endswith("/ten_steps")):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        numbers = re.findall(r'<span class="number">\((\d)\)</span>', page)
        assert sorted(numbers) == list("12345678")
        assert page.count("<math") > 40
        assert "merror" not in page
        assert re.search(r'<html[^>]* lang="([\w-]+)"', page)[1] == ("zh-Hans" if name.startswith("zh/") else "en")


def test_the_lines_of_the_model_file_are_those_of_today(site):
    model_file = (ROOT / "modeling_vit_scratch" / "encoder_vit_scratch.py").read_text(encoding="utf-8")
    for name in (name for name in NAMES if name.endswith("/ten_steps")):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        text = re.sub(r"<[^>]+>", "", page)
        for line in ("F.linear(patchify(pixels, kernel), self.weight.flatten(1)", "pooled = hidden_states[:, 0]"):
            assert line in model_file
            assert line in text


def test_quoted_code_is_that_of_today_and_pages_read_alike_on_a_code_host(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from update_excerpts import QUOTE, updated

    quoted = 0
    for path in (path for folder in ("guide", "zh") for path in (DOCS / folder).glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert updated(path) == text, f"{path}: run python docs/update_excerpts.py"
        quoted += len(QUOTE.findall(text))
        assert text.count("```py\n") == len(QUOTE.findall(text))
        assert set(re.findall(r"^```\{(\w+)\}", text, flags=re.MULTILINE)) <= {"include"}
    assert quoted >= 30


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_structure(name):
    theirs = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    ours = (DOCS / "guide" / f"{name.removeprefix('zh/')}.md").read_text(encoding="utf-8")
    for pattern in (
        r"^#+ ", r"^```\S+.*$", r"^\[.*\]\(.*\.py\), (`.*`)", r"^\$\$$", r"\]\((\.\./pictures/[^)]+)\)", r"\\tag\{\d\}",
        r"^ *\S.*$(?=\n\n)",
    ):  # fmt: skip
        found = [re.findall(pattern, text, flags=re.MULTILINE) for text in (ours, theirs)]
        if pattern.startswith("^ *"):  # paragraphs: as many
            found = [len(matches) for matches in found]
        assert found[0] == found[1], pattern
    code = [re.sub(r"#.*", "", "".join(blocks(DOCS / f"{page}.md", "python"))) for page in (name, f"guide/{name[3:]}")]
    assert code[0] == code[1]
    assert len(re.findall(r"[\u4e00-\u9fff]", theirs)) > 300


@pytest.mark.parametrize(
    "name", [name for name, path in zip(NAMES, PAGES) if blocks(path, "python") and name not in TRANSLATED]
)
def test_python_of_a_page_runs_in_its_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile("\n".join(blocks(DOCS / f"{name}.md", "python")), name, "exec"), {"__name__": "__main__"})
    # What a comment after a print says first is what is printed.
    printed = told.getvalue().splitlines()
    promised = [
        match.group(1)
        for text in blocks(DOCS / f"{name}.md", "python")
        for match in re.finditer(r"^ *print\(.*\)  # (\([\d, ]+\)|[\d.]+|True)", text, flags=re.MULTILINE)
    ]
    assert all(any(value in line for line in printed) for value in promised), (promised, printed)


@pytest.mark.parametrize("name", ["guide/positions", "zh/positions"])
def test_the_measured_table_is_that_of_the_record(name):
    measured = json.loads((ROOT / "model_cards" / "positions.json").read_text(encoding="utf-8"))
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    cells = {}
    for entry in measured:
        assert [run["seed"] for run in entry["runs"]] == [0, 1, 2]
        assert all(entry["name"].split(", ")[2] in run["command"] for run in entry["runs"])
        values = [100 * run["value"] for run in entry["runs"]]
        cells[entry["name"]] = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} %"
    found = {}
    sets = ("digits, 4 patches", "digits, 16 patches", "cifar10, 64 patches")
    row = r'^\| `"(\w+)"` \| ([^|]*)\| ([^|]*)\| ([^|]*)\| [\d. %]*\|$'
    for kind, *values in re.findall(row, page, flags=re.MULTILINE):
        found |= {f"{name}, {kind}": value.strip() for name, value in zip(sets, values)}
    assert found == cells
    assert {"none", "learned_1d", "learned_2d", "relative_1d"} <= {key.split(", ")[2] for key in found}


def test_notebooks_run_and_have_pictures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import run_notebooks

    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for name, notebook in run_notebooks.run_all(tmp_path).items():
        file = run_notebooks.FOLDER / f"{name}.ipynb"
        kept = nbformat.read(file, as_version=4)
        assert file.stat().st_size < 300_000
        for cell, saved in zip(notebook.cells, kept.cells, strict=True):
            kinds = [[o.output_type for o in c.get("outputs", ())] for c in (cell, saved)]
            assert set(kinds[0]) == set(kinds[1]), cell.source  # a picture where one is kept
        text = file.read_text(encoding="utf-8")
        assert text.count("image/png") >= 1
        badge = r"\(https://colab.research.google.com/github/[\w-]+/modeling_vit_scratch/blob/main/docs/notebooks/"
        assert re.search(rf"{badge}{name}.ipynb\)", text)
        assert str(ROOT) not in text
        for page in (ROOT / "README.md", DOCS / "index.md"):
            assert f"{name}.ipynb" in page.read_text(encoding="utf-8")
        prose = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
        links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", prose)
        assert [link for link in links if not (file.parent / link).exists()] == []
    assert {path.stem for path in run_notebooks.FOLDER.glob("*.ipynb")} == set(run_notebooks.NAMES)


def test_pictures_are_small_and_used():
    pictures = sorted((DOCS / "pictures").glob("*.png"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert (DOCS / "pictures" / "strip.png").stat().st_size < 300_000
    sizes = [path.stat().st_size for path in pictures if path.stem != "strip"]
    assert len(sizes) >= 10
    assert max(sizes) <= 80_000
    assert sum(sizes) <= 1_000_000
    text += (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"pictures/{path.name}" in text for path in pictures)


def test_pictures_are_drawn_from_a_photo_and_a_network(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import make_pictures

    config = ViTScratchConfig.from_variant("Mi/8", image_size=112, num_hidden_layers=2, num_labels=3)
    size = {"height": 112, "width": 112}
    photos = make_pictures.photos()
    assert list(photos) == ["palace", "flower", "portrait"]
    model, processor = ViTScratchForImageClassification(config), ViTScratchImageProcessor(size=size)
    journey = make_pictures.Journey(model, processor, photos["flower"])
    assert (journey.patches().swapaxes(1, 2).reshape(112, 112, 3) == journey.pixels).all()
    assert journey.likeness()[:, make_pictures.ASKING[0], make_pictures.ASKING[1]] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(torch.from_numpy(journey.states[0][1:] - journey.patch_tokens),
                               journey.model.vit.embeddings.position_embeddings.weight[0, 1:].detach())  # fmt: skip
    assert set(make_pictures.DRAWINGS) == {path.stem for path in (DOCS / "pictures").glob("[01]*.png")}
    first, again = (make_pictures.save("09_layers", journey, tmp_path / part) for part in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    with Image.open(first) as drawn, Image.open(DOCS / "pictures" / "09_layers.png") as kept:
        assert drawn.size == kept.size


def help_of(script: str, monkeypatch, arguments: tuple[str, ...] = ()) -> str:
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--help", "all"])
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        load_script(script).main()
    return told.getvalue()


def test_commands_have_flags_that_their_scripts_know(monkeypatch):
    assert len(COMMANDS) > 20
    for page, command in COMMANDS:
        words = shlex.split(command)
        place = next(index for index, word in enumerate(words) if word.startswith("scripts/") and word.endswith(".py"))
        script, arguments = Path(words[place]).stem, words[place + 1 :]
        subcommand = tuple(arguments[:1]) if script == "visualize" and arguments[0] != "augmentation" else ()
        text = help_of("finetune" if script == "visualize" and not subcommand else script, monkeypatch, subcommand)
        unknown = [w for w in arguments if w.startswith("--") and not re.search(rf"^\s+{w}\b", text, re.MULTILINE)]
        assert not unknown, f"howto/{page}.md: {command}"


def test_every_script_is_in_the_reference():
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## (\w+)\.py$", page, flags=re.MULTILINE)) == sorted(
        path.stem for path in (ROOT / "scripts").glob("*.py")
    )


def run(command: str, monkeypatch) -> str:
    """A command of a page in this process. Returns what it says."""
    words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", words[1:])
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert not load_script(Path(words[1]).stem).main()
    return told.getvalue()


def test_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "photos", each=8)
    config = ViTScratchConfig.from_variant("test/4", image_size=32, hidden_act="gelu_pytorch_tanh", num_labels=5)
    save_checkpoint(ViTScratchForImageClassification(config), tmp_path / "B_16.npz", format="npz")
    for page, start, told in RUN:
        command = next(command for name, command in COMMANDS if name == page and command.startswith(start))
        for long, short in SHORTER.items():
            command = command.replace(long, short)
        assert told in run(command, monkeypatch), command


def test_the_migration_page_has_the_names_of_the_conversion():
    page = (DOCS / "migration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.{}]+)` \|([^|]*)\|([^|]*)\|$", page, flags=re.MULTILINE)
    for column, name in ((1, "transformers"), (2, "timm")):
        form, found = FORMATS[name], {row[0]: re.findall(r"`([^`]+)`", row[column]) for row in rows}
        usual = {key: values[0] for key, values in form.dialects.items()} | {"prefix": "", "i": "{i}"}
        wanted = {}
        for ours, theirs, _ in form.rows:
            names = [theirs] if isinstance(theirs, str) else theirs
            wanted[re.sub(r"\.(weight|bias)$", "", ours)] = [
                re.sub(r"\.(weight|bias)$", "", their.format(**usual)) for their in names
            ]
        assert {ours: theirs for ours, theirs in found.items() if theirs} == wanted


def test_the_migration_page_has_the_names_of_fields_and_flags(monkeypatch):
    page = (DOCS / "migration.md").read_text(encoding="utf-8")
    fields = page[page.index("## Fields") : page.index("## Flags")]
    named = {re.split(r"[=:]", name)[0] for row in re.findall(r"^\|[^|]*\|([^|]*)\|$", fields, flags=re.MULTILINE)
             for name in re.findall(r"`(\w+)[=`]", row)}  # fmt: skip
    assert len(named) > 15
    assert named <= {*ViTScratchConfig.__annotations__, "num_labels"}
    theirs = set(ViTConfig.__annotations__) - {"encoder_stride", "pooler_output_size", "pooler_act"}
    assert theirs <= set(ViTScratchConfig.__annotations__)

    flags, text = page[page.index("## Flags") : page.index("## Names")], help_of("finetune", monkeypatch)
    ours = re.findall(r"--\w+", flags[: flags.index("Not needed")])
    for row in re.findall(r"^\|[^|]*\|([^|]*)\|$", flags, flags=re.MULTILINE):
        ours += re.findall(r"--\w+", row)
    assert len(ours) > 40
    assert not [flag for flag in ours if flag != "--help" and not re.search(rf"^\s+{flag}\b", text, re.MULTILINE)]


def test_the_soak_is_on_record():
    page = " ".join((DOCS / "howto" / "predict.md").read_text(encoding="utf-8").split())
    record = json.loads((ROOT / "model_cards" / "benchmark_soak.json").read_text(encoding="utf-8"))
    assert record["minutes"] == 60
    for name in ("predict.py", "finetune.py"):
        summary = record["sets"][name]["summary"]
        *first, last = (f"{megabytes:.0f}" for megabytes in summary["megabytes"]["quarters"])
        assert f"{', '.join(first)} and {last} MB" in page
    files = [record["sets"][name]["summary"]["open_files"]["quarters"][1:] for name in record["sets"]]
    assert all(len(set(of_one)) == 1 for of_one in files)
    assert "with {:.0f} and {:.0f} open files".format(*(of_one[0] for of_one in files)) in page
