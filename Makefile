# Two commands matter: `make demo` and `make test`. Each sets up everything it needs in .venv.
PYTHON ?= python3
STAMP := .venv/.installed
WHEEL := .venv/.wheel
EXTRAS := .venv/.extras

.PHONY: venv demo test test-slow check bench clean
venv: $(STAMP)

# torch first and by itself: the pinned release, before anything else can ask for another build of it.
# pip would compile one module after the other, and the libraries' own tests with them.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[demo,dev]'
	-.venv/bin/python -m compileall -q -j 0 -x '/tests?/|/testing/' .venv/lib
	touch $@

# Ray, submitit, pyarrow and Flower Datasets, 140 MB, which `make demo` and `make test` do without: some slow tests need them.
$(EXTRAS): $(STAMP)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,slurm,tables,peers]'
	touch $@

demo: $(STAMP)
	.venv/bin/fedtailor demo

# The tests run against the built wheel, from a folder where the checkout cannot be imported.
test: $(STAMP)
	scripts/test

test-slow: $(EXTRAS)
	scripts/test -m slow

check: $(STAMP)
	scripts/check

bench: $(STAMP)
	.venv/bin/python -m benchmarks.deployment

clean:
	rm -rf .venv build dist outputs *.egg-info
