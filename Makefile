# make demo    an environment, the package, a model fine-tuned on real handwriting from the weights that are here, what
#              these gained over none, and its folder served without the package
# make test    an environment with the test tools, ruff and the tests
# make docs    the guide and the reference as a website in outputs/docs
# make clean   removes environments and outputs/demo
#
# On Linux, PyPI's torch brings CUDA along (gigabytes). For the small CPU build, first:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where the demo goes, and its second environment.
DEMO = outputs/demo
SERVE = $(VENV)/serve
# What it starts from, and what both of its runs get. 24 pixels are plenty for digits of 8 x 8.
PRETRAINED = model_cards/vit-tiny-imagenet
BUDGET = --image_size 24 --num_train_epochs 4 --learning_rate 1e-3
LAUNCH = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
FINETUNE = $(LAUNCH) scripts/finetune.py --dataset_name digits --save_strategy no $(BUDGET)
export TOKENIZERS_PARALLELISM = false

# What anybody does with a saved model: FOLDER IMAGE [IMAGE ...]
define CLASSIFY
import sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
for image in sys.argv[2:]:
    best = classify(image)[0]
    print(f"{image}  {best['label']}  {best['score']:.4f}")
endef
export CLASSIFY

# Installs this package with what it needs: by uv, in half of pip's time; by pip where uv can't be had or fails.
define install
	$(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
		-c constraints.txt -e "$(1)" || $(BIN)/python -m pip install --quiet -c constraints.txt -e "$(1)"
endef

.PHONY: demo test lint docs clean

demo: $(VENV)/installed $(SERVE)
	rm -rf $(DEMO)
	$(FINETUNE) --config_name $(PRETRAINED) --config_overrides representation_size=None --output_dir $(DEMO)/scratch
	$(FINETUNE) --model_name_or_path $(PRETRAINED) --output_dir $(DEMO)/digits --export_examples $(DEMO)/examples
	@echo
	@echo "The same network, images and steps, from random weights and from those in $(PRETRAINED):"
	$(BIN)/python scripts/transfer.py compare $(DEMO)/scratch $(DEMO)/digits
	@echo
	@echo "The folder in a fresh process that has not got the package:"
	$(SERVE)/bin/python -c "$$CLASSIFY" $(DEMO)/digits $(DEMO)/examples/*.png

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W -q docs outputs/docs
	@echo "Open outputs/docs/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(call install,.)
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(call install,.[test])
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# A second environment that sees the first one's packages, but not this one: a path file does not follow the path files
# of the folder it names, so the editable install stays out of sight.
$(SERVE): $(VENV)/installed
	$(PYTHON) -m venv --without-pip $@
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($@/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"

clean:
	rm -rf $(VENV) $(DEMO)
