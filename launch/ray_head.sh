#!/usr/bin/env bash
# Starts Ray's head on this machine; ray_worker.sh on the others joins it. End it with 'ray stop'.
#
#   bash launch/ray_head.sh [ARGUMENT OF 'ray start'...]        e.g. --num-gpus=8 --block
#   then, on any node of it:  mxdist train CONFIG cluster.address=auto learner.gpus_per_rank=1 ...
#
# Edit: nothing, if all nodes reach each other over the interface of the default route. Else set NODE_ADDRESS to this
# node's address on the network that they share. Ports: launch/cluster.sh. The token that keeps others out is made in
# ~/.ray/auth_token; copy it to nodes that do not share that folder. The checkout and run.dir have to lie on a file
# system that all nodes mount, or mxdist has to be installed alike on each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

address=${NODE_ADDRESS:-$(own_address || true)}
[ -n "$address" ] || fail "node $(hostname) has no default route to take its address from; set NODE_ADDRESS"
require_free "$RAY_PORT"
if ! has_token; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
fi
start_ray --head --node-ip-address="$address" --port="$RAY_PORT" --include-dashboard=false "$@"
echo "Ray's head runs on $(hostname); on the other nodes: bash launch/ray_worker.sh $address:$RAY_PORT"
