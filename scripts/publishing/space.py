# SPDX-License-Identifier: Apache-2.0
"""A Space on the Hub for one model: the page of scripts/app.py, or one without a server. It needs not this package."""

import argparse
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.hub.commit import PAGE, ConnectionLost, find_model
from modeling_vit_scratch.hub.contents import Upload
from publishing.checks import check_model


_PAGE = Path(find_spec("modeling_vit_scratch").origin).parent / "page"
CODE = sorted(file for file in _PAGE.iterdir() if file.suffix in (".py", ".html", ".css"))
# The versions that the tests run the page with.
GRADIO, PYTHON = "6.31.0", "3.11"

_APP = '''# SPDX-License-Identifier: Apache-2.0
"""The page of a model. Written by scripts/publish.py --space."""

from {page}.layout import build, launch
from {page}.model import load


MODEL, REVISION = "{model}", "{revision}"

launch(build(load(MODEL, trust_remote_code={trust}, revision=REVISION), link=f"https://huggingface.co/{{MODEL}}"))
'''
_REQUIREMENTS = """# The small builds that compute on the CPU. For a Space with a GPU, leave out the next line.
--extra-index-url https://download.pytorch.org/whl/cpu
torch=={torch}
transformers=={transformers}
"""


def plan_space(source: str, repo_id: str) -> tuple[list[Upload], list[str], str]:
    """The files of a Space, the problems, and the Hub id of its model: `source`, or if that is a folder, `repo_id`."""
    folder, problems = Path(source), []
    model, has_code, revision = repo_id, True, "main"
    if folder.is_dir():
        problems = check_classifier(folder)
    else:
        found = find_source(source)
        model, has_code = source, any(file.rfilename.endswith(".py") for file in found.siblings or ())
        revision = found.sha if has_code else "main"  # other people's code is pinned to the commit that it has now

    names = {"model": model, "revision": revision, "trust": has_code, "title": repo_id.rpartition("/")[2]}
    names |= {"page": PAGE, "gradio": GRADIO, "python": PYTHON}
    names |= {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    card = Path(__file__).with_name("space.md").read_text(encoding="utf-8")
    texts = {"README.md": card, "app.py": _APP, "requirements.txt": _REQUIREMENTS}
    uploads = [Upload(path, text.format(**names).encode()) for path, text in texts.items()]
    uploads += [Upload(f"{PAGE}/{file.name}", file) for file in CODE]
    return sorted(uploads, key=lambda upload: upload.path), problems, model


def check_classifier(folder: Path) -> list[str]:
    problems = check_model(folder)
    if not problems and "ForImageClassification" not in (folder / "config.json").read_text("utf-8"):
        problems = [f"{folder} holds no image classifier, but the page shows classes. Fine-tune it first."]
    return problems


def find_source(source: str) -> Any:
    if source.count("/") != 1:
        raise InputError(f"{source} is no folder, nor USER/NAME of a model on the Hub.")
    return find_model(source)


def plan_static(source: str, repo_id: str, images: list[str] | None) -> tuple[list[Upload], list[str], str]:
    """As `plan_space`, of a Space that has the model in it: its licence is that of the model's card."""
    from exporting.export import missing_packages
    from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
    from modeling_vit_scratch.evaluation.predictions import load_model

    if missing := missing_packages("web"):
        raise InputError(f'--static needs {", ".join(missing)}: pip install -e ".[export]"')
    from exporting.web import build

    folder = Path(source)
    if folder.is_dir():
        if problems := check_classifier(folder):
            return [], problems, repo_id
        card = ModelCard.load(folder / "README.md").data if (folder / "README.md").is_file() else None
    else:
        card = find_source(source).card_data
    if card is None or card.license is None:
        problem = "has no card with a licence, and its weights are in the page. Write it: scripts/card.py --license"
        return [], [f"{source} {problem}"], repo_id
    model = repo_id if folder.is_dir() else source
    arguments = EvaluationArguments()
    arguments.model = source
    network, processor = load_model(arguments)
    web = build(network.float().eval(), processor, images, model, f"https://huggingface.co/{model}")
    print(*(f"  {line}" for line in web.lines), sep="\n")
    text = Path(__file__).with_name("static_space.md").read_text(encoding="utf-8")
    readme = ModelCard(text.format(title=repo_id.rpartition("/")[2], model=model))
    for name in ("license", "license_name", "license_link"):
        setattr(readme.data, name, card.get(name))
    files = web.files | {"README.md": str(readme).encode()}
    return [Upload(path, content) for path, content in sorted(files.items())], [], model


def check_served(model: str, arguments: argparse.Namespace) -> str | None:
    """What the user has to do so that a Space can load its model, if anything. Raises InputError if there is none."""
    try:
        private = find_model(model).private
    except InputError as error:
        if isinstance(error, ConnectionLost):
            raise
        raise InputError(f"{error} The page needs the model on the Hub: publish it first, without --space.") from error
    if private and arguments.static:
        if not arguments.private:
            raise InputError(f"{model} is private, and a page with --static holds its weights: add --private.")
        return None
    return f"{model} is private: give the Space the secret HF_TOKEN, a token that may read it." if private else None
