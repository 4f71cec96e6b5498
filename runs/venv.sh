# Sourced by test.sh and quickstart.sh: makes .venv and installs requirement files that are not installed yet.
#
#   source runs/venv.sh; prepare_venv requirements.txt requirements-dev.txt
#
# PYTHON=… chooses the Python for it (default: the first one found of at least 3.11).

prepare_venv() {
    local file candidate chosen="" files=() missing="" candidates=(python3.11 python3.12 python3.13 python3 python)
    for file in "$@"; do
        files+=(-r "$file")
        grep -qxF "$(cksum < "$file") $file" .venv/installed 2>/dev/null || missing=yes
    done
    [ "$missing" ] || return 0
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            chosen=$candidate
            break
        fi
    done
    [ "$chosen" ] || { echo "needs Python 3.11 or later, not ${PYTHON:-found} (PYTHON=… says where it is)" >&2; exit 2; }
    echo "installing $* in .venv" >&2
    if [ ! -e .venv/bin/activate ] && [ ! -e .venv/Scripts/activate ]; then
        "$chosen" -m venv .venv || { echo "$chosen -m venv .venv failed (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
    fi
    activate_venv
    # torch first and alone: another package's wider range must not choose its version
    python -m pip install --quiet "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)" || return 1
    python -m pip install --quiet "${files[@]}" || return 1
    for file in "$@"; do echo "$(cksum < "$file") $file"; done >> .venv/installed
}

activate_venv() {
    if [ -e .venv/bin/activate ]; then source .venv/bin/activate; else source .venv/Scripts/activate; fi
}
