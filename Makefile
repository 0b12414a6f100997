# make demo    an environment, the package, a model fine-tuned on real handwriting, and its folder served without the package
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
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs clean

demo: $(VENV)/installed $(SERVE)
	rm -rf $(DEMO)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		scripts/finetune.py --output_dir $(DEMO)/digits --export_examples $(DEMO)/examples
	@echo
	@echo "The folder in a fresh process that has not got the package:"
	$(SERVE)/bin/python scripts/classify.py $(DEMO)/digits $(DEMO)/examples/*.png

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest -n 2

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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
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
