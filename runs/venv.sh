# Sourced by test.sh and quickstart.sh: makes .venv (once) with what the given requirement files name.
#
#   source runs/venv.sh; prepare_venv requirements.txt requirements-dev.txt
#
# PYTHON=… chooses the Python it is made with; else the first one of at least 3.11.

prepare_venv() {
    local candidate chosen="" stamp wanted
    stamp=.venv/installed-$(basename "${@: -1}" .txt)
    wanted=$(cat "$@" | cksum)
    [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ] || return 0
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            chosen=$candidate
            break
        fi
    done
    [ -n "$chosen" ] || { echo "needs Python 3.11 or later (PYTHON=… says where it is)" >&2; exit 2; }
    echo "setting up .venv: $*" >&2
    [ -x .venv/bin/python ] || "$chosen" -m venv .venv
    # torch first and alone: another package's wider range must not choose its version
    .venv/bin/python -m pip install --quiet "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
    local file files=()
    for file in "$@"; do files+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet "${files[@]}"
    echo "$wanted" > "$stamp"
}
