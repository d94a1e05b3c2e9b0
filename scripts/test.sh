#!/usr/bin/env bash
# Runs every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
cd "$root"
ruff check .
ruff format --check .
pyright
pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
