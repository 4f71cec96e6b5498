#!/usr/bin/env bash
# Sets up .venv (once) and runs style check and tests.   bash test.sh [--extra] [pytest options]
# --extra adds the slow tests (marked `extra`) and installs requirements-extra.txt, part of which is compiled.
set -euo pipefail
cd "$(dirname "$0")"
source runs/venv.sh
requirements=(requirements.txt requirements-dev.txt) marks="not extra"
if [ "${1:-}" = "--extra" ]; then
    requirements+=(requirements-extra.txt) marks=""
    shift
fi
prepare_venv "${requirements[@]}"
activate_venv

ruff check .
exec python -m pytest -m "$marks" "$@"
