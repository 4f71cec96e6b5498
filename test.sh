#!/usr/bin/env bash
# Sets up .venv (once) and runs style check and tests.   bash test.sh [--extra] [pytest options]
# --extra adds the slow tests (marked `extra`).
set -euo pipefail
cd "$(dirname "$0")"

# the first Python of at least 3.11; PYTHON=… chooses another
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        PYTHON=$candidate
        break
    fi
done
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "test.sh: needs Python 3.11 or later" >&2; exit 2; }

wanted=$(cat requirements.txt requirements-dev.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    # torch first and alone: another package's wider range must not choose its version
    .venv/bin/python -m pip install --quiet "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
    .venv/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
    echo "$wanted" > .venv/installed
fi

marks="not extra"
if [ "${1:-}" = "--extra" ]; then
    marks=""
    shift
fi
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -m "$marks" "$@"
