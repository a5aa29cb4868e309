# make demo   two hosts and a client on this machine, a real guest moved three ways, beside QEMU's own migration
# make test   the whole suite, what CI runs
# The rest: lint, format, bench, test-long, clean.

PYTHON := .venv/bin/python
UV := .cache/uv/bin/uv
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/.venv

.PHONY: demo test test-long lint format bench install clean

demo: install
	.venv/bin/vmferry lab demo

test: install
	cargo test --quiet --release --workspace --exclude ferry-python
	-.venv/bin/vmferry check
	$(PYTHON) -m pytest -m "not long"

test-long: install
	$(PYTHON) -m pytest

bench: install
	$(PYTHON) bench/against_qemu.py

lint: install
	cargo fmt --all --check
	cargo clippy --quiet --release --workspace --all-targets -- -D warnings
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check src tests bench

format: install
	cargo fmt --all
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Quick when there is nothing to do: packages, lock files and sources are looked at, not trusted.
install:
	tools/install-packages
	@test -x $(UV) || { python3 -m venv .cache/uv && .cache/uv/bin/pip install --quiet 'uv==0.13.9'; }
	@test -x .venv/bin/python || $(UV) venv --quiet --python "$$(command -v python3)" .venv
	$(UV) sync --quiet --frozen --all-extras
	cargo build --quiet --release --locked -p ferry-synthetic

clean:
	.venv/bin/vmferry lab clean || true
	rm -rf .venv .cache target
