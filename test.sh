#!/usr/bin/env bash
# Sets up .venv (once) and runs style check and tests.   bash test.sh [--extra] [pytest options]
# --extra adds the slow tests (marked `extra`) and installs requirements-extra.txt.
set -euo pipefail
cd "$(dirname "$0")"
source runs/venv.sh
prepare_venv requirements.txt requirements-dev.txt
activate_venv
marks="not extra"
if [ "${1:-}" = "--extra" ]; then
    prepare_venv requirements-extra.txt || echo "requirements-extra.txt was not installed: what needs it is skipped" >&2
    marks=""
    shift
fi
ruff check .
exec python -m pytest -m "$marks" "$@"
