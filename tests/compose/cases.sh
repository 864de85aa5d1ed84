#!/usr/bin/env bash
# Cases of the compose demo; an engine is there. Prints "N passed, N failed" and ends with 1 if any failed.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
export COMPOSE_PROJECT_NAME=fedhypevae-test
export FEDHYPEVAE_SETTINGS="num-rounds=${COMPOSE_TEST_ROUNDS:-6} synthetic-rows=1000 round-timeout=300.0"
passed=0
failed=0
compose() { docker compose -f "$root/deploy/compose.yaml" "$@"; }
check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@" >"$scratch/last.log" 2>&1; then
        passed=$((passed + 1))
        echo "ok   $name"
    else
        failed=$((failed + 1))
        echo "FAIL $name"
        tail -15 "$scratch/last.log" | sed 's/^/     /'
    fi
}
refuse() { ! "$@"; }
reach() { # reach SERVICE HOST PORT: whether a container can open a connection
    compose exec -T "$1" python -c "import socket; socket.create_connection(('$2', $3), 4)"
}
address() { # address SERVICE: its address on its own network
    docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$(compose ps -q "$1")"
}
round_is() { # round_is N: the run has a checkpoint of round N or later
    compose exec -T superlink python -c "
from pathlib import Path
from server_app.checkpoint import load_checkpoint
assert load_checkpoint(Path('/srv/server/work/outputs/run'))[0].round >= $1"
}
wait_round() {
    for _ in $(seq 150); do
        round_is "$1" 2>/dev/null && return 0
        sleep 2
    done
    return 1
}
network() { docker network ls --format '{{.Name}}' | grep "_$1\$"; }
judge() { # the summary is of a whole run, and says who was missing
    compose exec -T superlink python -c "
import json
summary = json.load(open('/srv/server/work/outputs/run/summary.json'))
assert summary['status'] == 'completed' and summary['sites'] == 4, summary['status']
assert summary['scores'] and summary['privacy']['data_is_public'], 'no scores'
assert len(summary['rounds_taken_part']) == summary['rounds']
missing = {site for round in summary['rounds_missing'] for site in round}
assert 'site-2' in missing, missing
print(json.dumps(summary['rounds_taken_part']))"
}
ledgers_right() { # every ledger verifies, and no site was charged more than the plan
    for number in 1 2 3 4; do
        compose exec -T "site-$number" python -c "
from pathlib import Path
from client_app.ledger import Ledger
with Ledger.open(Path('/srv/site/ledger.db'), 'demo/site-$number', read_only=True) as ledger:
    (run,) = ledger.runs.values()
    assert ledger.spent(1e-5).epsilon <= 3.01, ledger.spent(1e-5).epsilon" || return 1
    done
}
scratch=$(mktemp -d)
clean() {
    compose --profile run down -v --timeout 5 >/dev/null 2>&1
    rm -rf "$scratch"
}
trap clean EXIT
clean
mkdir -p "$scratch"

check "the compose files are valid" compose config -q
check "images build" compose --profile run build
check "init, server and sites come up" compose up --detach --wait --wait-timeout 600 superlink server-app site-1 site-2 site-3 site-4
check "nothing runs as root" bash -c "for s in superlink server-app site-1 site-4; do [ \"\$(docker compose -f '$root/deploy/compose.yaml' exec -T \$s id -u)\" = 10001 ] || exit 1; done"
check "the root file system is read-only" refuse compose exec -T site-1 touch /x
check "a site reaches the server's gRPC port" reach site-1 superlink 9092
check "a site does not reach the control port" refuse reach site-1 superlink 8000
# each refusal with a control that the listener is there, and reached from where it may be
compose exec -d site-2 python -m http.server 7777 --bind 0.0.0.0
python3 -m http.server 7778 --bind 0.0.0.0 >/dev/null 2>&1 &
outside=$!
gateway=$(docker network inspect bridge -f '{{(index .IPAM.Config 0).Gateway}}')
sleep 3
check "control: the server reaches a listener at a site" reach superlink site-2 7777
check "a site does not reach that listener at another site" refuse reach site-1 "$(address site-2)" 7777
check "a site does not know another site's name" refuse reach site-1 site-2 7777
check "control: an ordinary container reaches a listener outside" docker run --rm fedhypevae-site \
    python -c "import socket; socket.create_connection(('$gateway', 7778), 4)"
check "a site does not reach that listener outside" refuse reach site-1 "$gateway" 7778
kill "$outside"

compose run -T --rm runner >"$scratch/runner.log" 2>&1 &
runner=$!
check "the run starts" wait_round 1
compose kill site-2 >/dev/null 2>&1
check "a round ends without the killed site" wait_round 2
compose start site-2 >/dev/null 2>&1
compose pause site-3 >/dev/null 2>&1
sleep 20
compose unpause site-3 >/dev/null 2>&1
docker network disconnect "$(network site-4)" "$(compose ps -q site-4)"
sleep 20
docker network connect --alias site-4 "$(network site-4)" "$(compose ps -q site-4)"
wait "$runner"
code=$?
cp "$scratch/runner.log" "$scratch/last.log"
if [ "$code" -eq 0 ]; then passed=$((passed + 1)); echo "ok   the run completes"; else
    failed=$((failed + 1)); echo "FAIL the run completes"; tail -25 "$scratch/runner.log" | sed 's/^/     /'; fi
check "the summary tells who took part" judge
check "every ledger is right" ledgers_right
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
