# What ray_head.sh, ray_worker.sh and slurm.sbatch share. Sourced, never run.
#
# Edit: the ports, if a firewall or another program wants others. Each can also be set in the environment.
# Every port that Ray listens on is listed here; the learner's rendezvous is learner.port of the configuration.

: "${RAY_PORT:=6379}"                  # of the head: its address for the others is HEAD:RAY_PORT
: "${RAY_NODE_MANAGER_PORT:=6380}"     # these six on every node
: "${RAY_OBJECT_MANAGER_PORT:=6381}"
: "${RAY_RUNTIME_ENV_PORT:=6382}"
: "${RAY_AGENT_GRPC_PORT:=6383}"
: "${RAY_AGENT_HTTP_PORT:=6384}"
: "${RAY_METRICS_PORT:=6385}"
: "${RAY_FIRST_WORKER_PORT:=20000}"    # processes of the run, on every node
: "${RAY_LAST_WORKER_PORT:=20999}"
: "${JOIN_SECONDS:=120}"               # how long a worker tries to reach the head

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PATH=${here%/launch}/.venv/bin:$PATH
# Whoever reaches Ray's ports can run programs on the node, so Ray asks for a token: the same file on every node.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
: "${RAY_AUTH_TOKEN_PATH:=$HOME/.ray/auth_token}"
export RAY_AUTH_TOKEN_PATH

ray_ports=(
    --node-manager-port="$RAY_NODE_MANAGER_PORT" --object-manager-port="$RAY_OBJECT_MANAGER_PORT"
    --runtime-env-agent-port="$RAY_RUNTIME_ENV_PORT" --dashboard-agent-grpc-port="$RAY_AGENT_GRPC_PORT"
    --dashboard-agent-listen-port="$RAY_AGENT_HTTP_PORT" --metrics-export-port="$RAY_METRICS_PORT"
    --min-worker-port="$RAY_FIRST_WORKER_PORT" --max-worker-port="$RAY_LAST_WORKER_PORT"
)

fail() {
    echo "mxdist: $*" >&2
    exit 2
}

# own_address [PEER]: the address of this node on the way to PEER, or to anywhere. Sends nothing.
own_address() {
    python3 - "${1:-192.0.2.1}" <<'PYTHON'
import socket, sys
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    probe.connect((sys.argv[1], 9))
    print(probe.getsockname()[0])
except OSError:
    sys.exit(1)
PYTHON
}

# await PID: wait for the process in spite of signals; their traps set signalled=1. Its exit code is in $code.
await() {
    while :; do
        signalled=
        wait "$1" && code=0 || code=$?
        [ -n "$signalled" ] || break
    done
}

# require_free PORT...: none of them has a listener on this node.
require_free() {
    local taken
    taken=$(python3 - "$@" <<'PYTHON'
import socket, sys
for port in map(int, sys.argv[1:]):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            print(port)
            break
PYTHON
    )
    [ -z "$taken" ] || fail "port $taken is taken on node $(hostname); end what holds it" \
        "(an earlier Ray: 'ray stop'), or set another in launch/cluster.sh"
}

# has_token: the cluster's token is there, or none is asked for.
has_token() {
    [ "$RAY_AUTH_MODE" != token ] || [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$RAY_AUTH_TOKEN_PATH" ]
}

# answers HOST PORT: somebody accepts connections there.
answers() {
    timeout 3 bash -c ": </dev/tcp/$1/$2" 2>/dev/null
}

# start_ray ARGUMENT...: 'ray start' with these ports and arguments, its reason in one sentence when it fails. Ray itself
# refuses a worker with another version of Ray or Python.
start_ray() {
    local log code
    command -v ray >/dev/null || fail "node $(hostname) has no 'ray'; install mxdist there (launch/quickstart.sh does)"
    require_free "$RAY_NODE_MANAGER_PORT" "$RAY_OBJECT_MANAGER_PORT" "$RAY_RUNTIME_ENV_PORT" "$RAY_AGENT_GRPC_PORT" \
        "$RAY_AGENT_HTTP_PORT" "$RAY_METRICS_PORT"
    log=$(mktemp)
    # Blocked, not handled: a scheduler's SIGTERM goes to every process of a job, and Ray has to outlive it until
    # mxdist has written its checkpoint.
    env --block-signal=TERM ray start --disable-usage-stats "${ray_ports[@]}" "$@" >"$log" 2>&1 && code=0 || code=$?
    if [ $code -ne 0 ]; then
        echo "mxdist: Ray did not start on node $(hostname): $(reason "$log")" >&2
        exit 2
    fi
    rm -f "$log"
}

# reason LOG: what Ray says is wrong.
reason() {
    if grep -q 'Version mismatch' "$1"; then
        grep -A 6 'Version mismatch' "$1" | tr -s ' \n' ' '
    else
        grep -E 'Error|Exception|error|already' "$1" | tail -n 1 || tail -n 1 "$1"
    fi | cut -c1-500
}
