#!/usr/bin/env bash
# Sets up .venv (once) and runs style check and tests.   bash test.sh [--extra] [pytest options]
# --extra adds the slow tests (marked `extra`) and installs what they need: requirements-extra.txt, and as root on Debian or
# Ubuntu a Chromium for the page's tests. For a debugger: bash test.sh -n 0 --pdb
set -euo pipefail
cd "$(dirname "$0")"
source runs/venv.sh
prepare_venv requirements.txt requirements-dev.txt
activate_venv
ruff check .
# one thread each: two processes whose threads wait for one another are slower than one
in_parallel() { OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n 2 --dist loadfile "$@"; }
if [ "${1:-}" != "--extra" ]; then
    in_parallel -m "not extra" "$@"
    exit
fi
shift
prepare_venv requirements-extra.txt || echo "requirements-extra.txt was not installed: what needs it is skipped" >&2
if ! command -v chromedriver > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing Debian's chromium and chromium-driver" >&2
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y chromium \
        chromium-driver; } > /dev/null || echo "chromium was not installed: the page's tests fail" >&2
fi
in_parallel -m "not extra" "$@" || [ $? -eq 5 ] # 5: none of the tests asked for
in_parallel -m extra "$@" || [ $? -eq 5 ]
