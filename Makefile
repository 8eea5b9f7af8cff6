# `make check` before a commit; the whole test suite is `uv run pytest`.
UV ?= uv
RUN = $(UV) run --locked

.PHONY: check docs format format-check lint types test-fast test

check: format-check lint types test-fast

format:
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

format-check:
	$(RUN) ruff format --check .

lint:
	$(RUN) ruff check .

types:
	$(RUN) python benchmarks/check_types.py

test-fast:
	$(RUN) pytest -m "not long and not slow and not network and not gpu"

test:
	$(RUN) pytest

# Into site/; serve it with `uv run --group docs mkdocs serve`.
docs:
	NO_MKDOCS_2_WARNING=1 $(RUN) --group docs mkdocs build --strict
