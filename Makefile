# Everything runs in .venv, made from setup.cfg with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := outputs/demo
# a small network that tells digits apart, whose features and answers evaluate the demo
DIGITS := --protocol classifier --weights evaluation/digits_classifier
# docs/performance.md has the commands and the results of their real sizes
BENCHMARKS := sampling samplers training_step training evaluation startup conversion data frechet

.DEFAULT_GOAL := help
.PHONY: help install demo app test bench soak quality types style clean

help:  ## say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## make .venv and install the package into it, editable

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,demo,eval,test]'
	@touch $@

demo: $(INSTALLED)  ## prepare the digits, train on them, generate ten of each, evaluate: a few minutes on two cores
	$(BIN)/python prepare_imagenet64.py --source mnist --output_dir $(DEMO)/data
	$(BIN)/python train_imagenet64.py --config configs/training/demo.yaml --train_data_dir $(DEMO)/data --output_dir $(DEMO)
	$(BIN)/python generate_images.py --model $(DEMO)/model --output_dir $(DEMO)/samples \
		--class_labels all --num_images_per_label 10 --guidance_scale 2.5 --num_inference_steps 20
	$(BIN)/python evaluate_models.py reference --source $(DEMO)/data --output_dir $(DEMO)/reference $(DIGITS)
	$(BIN)/python evaluate_models.py model --model $(DEMO)/model --output_dir $(DEMO)/evaluated $(DIGITS) \
		--num_images 500 --guidance_scale 2.5 --num_inference_steps 20 --batch_size 100
	@echo
	$(BIN)/python evaluate_models.py score --reference $(DEMO)/reference --model $(DEMO)/evaluated
	@echo
	@echo "the pipeline:   $(DEMO)/model"
	@echo "the grid:       $(DEMO)/samples/grid.png"
	@echo "the animation:  $(DEMO)/samples/denoising.gif"
	@echo "the manifest:   $(DEMO)/samples/manifest.json"

app: $(INSTALLED)  ## serve the page to play with, on the digits' model that comes along
	$(BIN)/python app.py

test: $(INSTALLED)  ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(INSTALLED)  ## run every benchmark at tiny size, into outputs/bench: minutes
	$(BIN)/python prepare_imagenet64.py --source mnist --output_dir $(DEMO)/data
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --small || exit; done
	$(BIN)/python benchmarks/performance_page.py --results_dir outputs/bench --output outputs/bench/performance.md

soak: $(INSTALLED)  ## kill and stop training runs at random moments, for minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

quality: $(INSTALLED)  ## check style, types and the links between documents, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/python -m pytest --noconftest tests/documents/test_links.py

types: $(INSTALLED)  ## check types
	@mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/imagenet64_diffusion
	$(BIN)/mypy

style: $(INSTALLED)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make made, .venv included
	rm -rf $(VENV) build dist *.egg-info outputs .mypy_cache .pytest_cache .ruff_cache
