#!/usr/bin/env bash
# Joins this machine to the Ray head that ray_head.sh started on another. End it with 'ray stop'.
#
#   bash launch/ray_worker.sh HEAD[:PORT] [ARGUMENT OF 'ray start'...]        e.g. --num-gpus=8 --block
#
# Edit: nothing, if this node reaches the head over the network that all of them share. Else set NODE_ADDRESS to its
# address there. Ports: launch/cluster.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

[ $# -ge 1 ] || fail "give the address that ray_head.sh printed: bash launch/ray_worker.sh HEAD:PORT"
host=${1%%:*}
port=$RAY_PORT
[ "$host" = "$1" ] || port=${1##*:}
shift

has_token || fail "node $(hostname) has no $RAY_AUTH_TOKEN_PATH; copy it there from the head"
until answers "$host" "$port"; do
    [ "$SECONDS" -lt "$JOIN_SECONDS" ] || fail "node $(hostname) cannot reach the Ray head at $host:$port;" \
        "start it with launch/ray_head.sh, or open the ports of launch/cluster.sh between the nodes"
    sleep 1
done
address=${NODE_ADDRESS:-$(own_address "$host" || true)}
[ -n "$address" ] || fail "node $(hostname) has no route to $host; set NODE_ADDRESS"
start_ray --address="$host:$port" --node-ip-address="$address" "$@"
echo "node $(hostname) ($address) has joined the Ray head at $host:$port"
