#!/usr/bin/env bash
# Cases of the compose demo; an engine is there. Prints "N passed, N failed" and ends with 1 if any failed.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
export COMPOSE_PROJECT_NAME=fedhypevae-test
rounds=${COMPOSE_TEST_ROUNDS:-12}
export FEDHYPEVAE_SETTINGS="num-rounds=$rounds min-sites=1 synthetic-rows=1000 meta-steps=20 round-timeout=300.0"
passed=0
failed=0
compose() { docker compose -f "$root/deploy/compose.yaml" "$@"; }
check() { # check NAME COMMAND...
    local name=$1 since=$SECONDS
    shift
    if "$@" >"$scratch/last.log" 2>&1; then
        passed=$((passed + 1))
        echo "ok   $name ($((SECONDS - since)) s)"
    else
        failed=$((failed + 1))
        echo "FAIL $name ($((SECONDS - since)) s)"
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
status() { # status EXPRESSION: whether it holds of the run's status file, `s`
    compose exec -T superlink python -c "
import json
s = json.load(open('/srv/server/work/outputs/run/status.json'))
raise SystemExit(0 if $1 else 1)"
}
wait_status() { # wait_status EXPRESSION: until it holds; no longer than 8 minutes
    local end=$((SECONDS + 480))
    while [ "$SECONDS" -lt "$end" ]; do
        status "$1" >/dev/null 2>&1 && return 0
        sleep 1
    done
    echo "after 8 minutes: $(compose exec -T superlink cat /srv/server/work/outputs/run/status.json 2>&1)"
    return 1
}
network() { docker network ls --format '{{.Name}}' | grep "_$1\$"; }
container() { compose ps --all --quiet "$1"; }
judge() { # the summary has the demo's form, and says who was missing and came back
    compose exec -T superlink python -c "
import json
from common.wire.allow_list import SCORE_NAMES
summary = json.load(open('/srv/server/work/outputs/run/summary.json'))
def expect(true, what):
    if not true:
        raise SystemExit(f'{what}: {json.dumps(summary)[:3000]}')
names = {'site-1', 'site-2', 'site-3', 'site-4'}
taken, missing = summary['rounds_taken_part'], summary['rounds_missing']
print(json.dumps([taken, missing]))
expect(summary['status'] == 'completed' and summary['sites'] == 4, 'status')
expect(summary['privacy']['data_is_public'] and summary['synthetic_rows'] == 1000, 'what was made')
expect(set(summary['privacy']['epsilon_spent_per_site']) == names, 'epsilon of each site')
expect(set(summary['scores']) <= set(SCORE_NAMES) and 'mixed' in summary['scores'], 'scores')
expect(all(set(score['per_site']) == names for score in summary['scores'].values()), 'scores of each site')
expect(summary['rounds'] == $rounds and len(taken) == len(missing) == $rounds, 'rounds')
expect(all(set(here) | set(gone) == names and not set(here) & set(gone) for here, gone in zip(taken, missing)), 'sites')
expect(all('site-1' in here for here in taken), 'the site that nothing happened to')
for name in ('site-2', 'site-3', 'site-4'):
    out = [number for number, gone in enumerate(missing) if name in gone]
    expect(out and any(name in here for here in taken[out[-1] + 1:]), f'{name} missed a round and came back')
"
}
ledgers_right() { # every ledger verifies, has this one run, and was charged for the rounds that took place and no more
    for number in 1 2 3 4; do
        compose exec -T "site-$number" python -c "
from pathlib import Path
from client_app.ledger import upkeep
from client_app.ledger.ledger import Ledger
with Ledger.open(Path('/srv/site/ledger.db'), 'demo/site-$number', read_only=True) as ledger:
    ledger.verify()
    (run,) = ledger.runs.values()
    epsilon, keys = upkeep.spent(ledger, 1e-5).epsilon, list(run.rounds)
    print(epsilon, keys)
    if not 0 < epsilon <= 3.01 or len(keys) > $rounds + 1:
        raise SystemExit(1)" || return 1
    done
}
scratch=$(mktemp -d)
clean() {
    compose --profile run down -v --timeout 5 >/dev/null 2>&1
    rm -rf "$scratch"
}
trap clean EXIT
all() { # in a function: bash would read on in a file that somebody edits meanwhile
    compose --profile run down -v --timeout 5 >/dev/null 2>&1

    check "the compose file is valid" compose config -q
    check "the compose file with the GPU is valid" compose -f "$root/deploy/compose.gpu.yaml" config -q
    check "images build" compose --profile run build
    check "init, server and sites come up" compose up --detach --wait --wait-timeout 600 superlink server-app site-1 site-2 site-3 site-4
    check "nothing runs as root" bash -c "for s in superlink server-app site-1 site-4; do [ \"\$(docker compose -f '$root/deploy/compose.yaml' exec -T \$s id -u)\" = 10001 ] || exit 1; done"
    check "control: a site writes where it may" compose exec -T site-1 touch /tmp/x /srv/site/x
    check "the root file system is read-only" refuse compose exec -T site-1 touch /x
    check "a site reaches the server's gRPC port" reach site-1 superlink 9092
    check "a site does not reach the control port" refuse reach site-1 superlink 8000
    # each refusal with a control that the listener is there, and reached from where it may be
    compose exec -d site-2 python -m http.server 7777 --bind 0.0.0.0
    python3 -m http.server 7778 --bind 0.0.0.0 >/dev/null 2>&1 &
    outside=$!
    gateway=$(docker network inspect bridge -f '{{range .IPAM.Config}}{{.Gateway}}{{end}}')
    # an engine that has just made its bridge does not tell
    gateway=${gateway:-$(ip -4 -o addr show docker0 | sed -E 's/.*inet ([0-9.]+).*/\1/')}
    sleep 3
    check "control: the server reaches a listener at a site" reach superlink site-2 7777
    check "a site does not reach that listener at another site" refuse reach site-1 "$(address site-2)" 7777
    check "a site does not know another site's name" refuse reach site-1 site-2 7777
    check "control: an ordinary container reaches a listener outside" docker run --rm fedhypevae-site \
        python -c "import socket; socket.create_connection(('$gateway', 7778), 4)"
    check "a site does not reach that listener outside" refuse reach site-1 "$gateway" 7778
    own=$(docker network inspect "$(network site-1)" -f '{{(index .IPAM.Config 0).Gateway}}')
    check "nor that listener over the gateway of its own network" refuse reach site-1 "${own:-$gateway}" 7778
    kill "$outside"

    # the run, with three of its four sites lost at once, each in its own way: Flower takes a minute to notice, and one
    # minute is enough for all; status.json's "missing" is that of the last round
    compose run -T --rm runner >"$scratch/runner.log" 2>&1 &
    runner=$!
    check "the run starts" wait_status "s['round'] >= 1"
    docker kill "$(container site-2)" >/dev/null
    docker pause "$(container site-3)" >/dev/null
    docker network disconnect "$(network site-4)" "$(container site-4)"
    check "a round ends without the killed site" wait_status "'site-2' in s['missing']"
    check "a round ends without the paused site" wait_status "'site-3' in s['missing']"
    check "a round ends without the site that was cut off" wait_status "'site-4' in s['missing']"
    docker start "$(container site-2)" >/dev/null
    docker unpause "$(container site-3)" >/dev/null
    docker network connect "$(network site-4)" "$(container site-4)"
    check "all three come back in mid-run" wait_status "s['status'] == 'running' and not s['missing']"
    completes() { wait "$runner" || { cat "$scratch/runner.log"; return 1; }; }
    check "the run completes" completes
    check "the runner shows summary.json" grep -q '"rounds_taken_part"' "$scratch/runner.log"
    check "the summary has the demo's form, and tells who took part" judge
    check "every ledger is right" ledgers_right
    FEDHYPEVAE_SETTINGS="method=dp_fedsgd num-rounds=2 output-dir=outputs/second" \
        check "another method of the comparison runs" compose run -T --rm runner
    if [ "$failed" -gt 0 ] && [ -n "${COMPOSE_TEST_LOGS:-}" ]; then
        mkdir -p "$COMPOSE_TEST_LOGS"
        compose logs --no-color >"$COMPOSE_TEST_LOGS/compose.log" 2>&1
        cp "$scratch/runner.log" "$COMPOSE_TEST_LOGS/"
        compose exec -T superlink cat /srv/server/work/outputs/run/status.json >"$COMPOSE_TEST_LOGS/status.json" 2>&1
        docker cp "$(container superlink)":/srv/server/logs "$COMPOSE_TEST_LOGS/server" >/dev/null 2>&1
        docker cp "$(container site-4)":/srv/site/logs "$COMPOSE_TEST_LOGS/site-4" >/dev/null 2>&1
    fi
    echo "all in $SECONDS s"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
{ all; exit; } # on one line: nothing of the file is read after it
