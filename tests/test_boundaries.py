# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: what may import what, that every knob is read, that nothing outgrows its file."""

import ast
import dataclasses
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers import TrainingArguments

import modeling_vit_scratch
from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.configuration_vit_scratch import CODE_VERSION
from modeling_vit_scratch.hub.contents import CODE


PACKAGE = Path(modeling_vit_scratch.__file__).parent
ROOT = PACKAGE.parent
HUB_FILES = sorted(PACKAGE.glob("*_vit_scratch.py"))
HUB_PACKAGES = {"torch", "transformers", "numpy", "PIL", "huggingface_hub"}


def imports(path: Path) -> set[str]:
    """Top-level names of absolute imports, and relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def source(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_hub_files_are_those_that_are_saved_and_nothing_else_stands_beside_them():
    assert [path.stem for path in HUB_FILES] == [
        "compatibility_vit_scratch", "configuration_vit_scratch", "encoder_vit_scratch", "image_decoding_vit_scratch",
        "image_processing_vit_scratch", "modeling_vit_scratch", "parts_vit_scratch", "positions_vit_scratch",
        "stem_vit_scratch", "variants_vit_scratch",
    ]  # fmt: skip
    assert {*PACKAGE.glob("*.py")} == {*HUB_FILES, PACKAGE / "__init__.py"}
    assert list(CODE) == HUB_FILES  # what publishing finds by following imports
    for path in HUB_FILES:
        assert path.read_text().splitlines()[1] == f"# modeling_vit_scratch {CODE_VERSION}"
    assert modeling_vit_scratch.__version__ == CODE_VERSION


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_import_each_other_and_what_every_hub_user_has(path):
    siblings = {f".{other.stem}" for other in HUB_FILES}
    absolute = {name.split(".")[0] for name in imports(path) - siblings}
    assert absolute - HUB_PACKAGES - set(sys.stdlib_module_names) == set()


def test_the_page_imports_what_a_space_has():
    # A Space has these files beside its app.py, and the packages of its requirements.txt, not this one.
    paths = source("modeling_vit_scratch/page")
    siblings = {f".{path.stem}" for path in paths} | {"."}
    absolute = {name.split(".")[0] for path in paths for name in imports(path) - siblings}
    packages = {"gradio", "jinja2", "torch", "transformers", "numpy", "PIL"}  # gradio brings jinja2
    assert absolute - packages - set(sys.stdlib_module_names) == set()


# What a folder of the package may import, beside the Hub files. A folder names only those above it.
ALLOWED = {
    "common": set(),
    "acceleration": {"common"},
    "checkpoint": {"common"},
    "data": {"common"},
    "augmentation": {"common", "data"},
    "distillation": {"common", "data"},
    "recipes": {"common"},
    "page": set(),
    "visualization": {"common", "data", "page"},
    "evaluation": {"common", "acceleration", "data"},
    "prediction": {"common", "acceleration", "data"},
    "hub": {"common"},
    "training": {
        "common",
        "acceleration",
        "checkpoint",
        "data",
        "augmentation",
        "distillation",
        "recipes",
        "evaluation",
        "hub",
    },
    "pretraining": {"common", "data", "augmentation", "training"},
    "cards": {"common", "data", "recipes", "training"},
}


def modules_imported(path: Path) -> set[Path]:
    """The package's files that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith(PACKAGE.name)):
            continue
        folder = path.parents[node.level - 1] if node.level else ROOT
        target = folder.joinpath(*(node.module or "").split("."))
        candidates = [target.with_suffix(".py"), *(target / f"{alias.name}.py" for alias in node.names)]
        found |= {file for file in candidates if file.is_file()}
    return found - {path}


def test_arrows_point_one_way():
    names = list(ALLOWED)
    for index, (folder, allowed) in enumerate(ALLOWED.items()):
        assert allowed <= set(names[:index])
        paths = source(f"modeling_vit_scratch/{folder}")
        assert paths
        for path in paths:
            others = {file.parent.name for file in modules_imported(path) if file.parent != PACKAGE} - {folder}
            assert others <= allowed, f"{folder}/{path.name} imports {others - allowed}"
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == set(ALLOWED)


def test_files_import_each_other_in_no_circle():
    paths = source("modeling_vit_scratch")
    order = TopologicalSorter({path: modules_imported(path) for path in paths if path.name != "__init__.py"})
    assert len(list(order.static_order())) > 60  # raises CycleError with the circle


def test_the_package_imports_no_script():
    scripts = {"scripts", *(path.stem for path in (ROOT / "scripts").iterdir())} - {"evaluate"}  # a library, too
    for path in source("modeling_vit_scratch"):
        assert not {name.partition(".")[0] for name in imports(path)} & scripts, path.name


def attributes_read(paths: list[Path]) -> set[str]:
    return {
        node.attr
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_field_of_the_configuration_is_read_by_the_network():
    own = {name for name in ViTScratchConfig.__annotations__ if not name.startswith("_")}
    assert len(own) > 20
    derived = {
        "image_size": "grid_hw", "patch_size": "patch_hw", "use_cls_token": "num_prefix_tokens",
        "stem_width_factor": "stem_width",
    }  # fmt: skip
    others = {PACKAGE / f"{name}_vit_scratch.py" for name in ("configuration", "image_decoding", "image_processing")}
    read = attributes_read([path for path in HUB_FILES if path not in others])
    assert {name for name in own if name not in read and derived.get(name) not in read} == set()


def test_every_flag_of_ours_is_read():
    names = ("training/arguments.py", "training/trainer.py", "pretraining/arguments.py", "common/flags.py")
    files = [PACKAGE / name for name in names]
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith(("Arguments", "Flags"))]
    flags = {
        node.target.id
        for own in classes
        for node in own.body
        if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_")
    }
    ours = flags - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(ours) > 50
    rooms = ("training", "pretraining", "augmentation", "data", "evaluation")
    paths = source(*(f"modeling_vit_scratch/{room}" for room in rooms), "scripts")
    read = attributes_read(paths)
    # Also where a loop goes over names: getattr(arguments, name) for name in ("image_size", ...).
    named = {
        node.value
        for path in paths
        for tree in ast.walk(ast.parse(path.read_text()))
        if isinstance(tree, (ast.For, ast.comprehension))
        for node in ast.walk(tree.iter)
        if isinstance(node, ast.Constant)
    }
    assert ours - read - named == set()


def test_no_file_outgrows_its_purpose():
    # About 500 lines ask for a new step. The encoder is read in one go, and so is shorter; so are the two files of the
    # image processor.
    limits = {
        "encoder_vit_scratch.py": 320, "image_decoding_vit_scratch.py": 425, "image_processing_vit_scratch.py": 405,
    }  # fmt: skip
    for path in source("modeling_vit_scratch", "scripts"):
        assert len(path.read_text().splitlines()) <= limits.get(path.name, 560), f"{path.name} is too long"
    assert not list(PACKAGE.rglob("utils.py"))
    for folder in {path.parent for path in source("modeling_vit_scratch")}:
        files = sorted(folder.glob("*.py"))
        lines = sum(len(path.read_text().splitlines()) for path in files)
        files = [path for path in files if path.name != "__init__.py"]
        most_files, most_lines = 16, 2800
        assert len(files) <= most_files, f"{folder.name}/ has {len(files)} files: it wants to be two rooms"
        assert lines <= most_lines, f"{folder.name}/ has {lines} lines"
    for path in sorted((ROOT / "scripts").glob("*.py")):
        functions = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert len(path.read_text().splitlines()) <= 150, f"{path.name} is no table of contents any more"
        assert "main" in functions


def test_every_file_says_its_licence_and_its_purpose():
    for path in source("modeling_vit_scratch", "scripts", "tests"):
        text = path.read_text()
        assert not text or text.startswith(("# SPDX-License-Identifier: Apache-2.0\n", "#!/usr/bin/env python")), path
        assert not text or ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"
