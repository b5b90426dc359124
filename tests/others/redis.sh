# Needs: redis-server redis-cli redis-benchmark

serve() {
    exec redis-server --bind "$LOCAL_HOST" --port "$LOCAL_PORT" --save '' --appendonly no --dir .
}

_cli() { redis-cli -h "$HOST" -p "$PORT" "$@"; }

_benchmark() {
    redis-benchmark -h "$HOST" -p "$PORT" -q "$@" | tr '\r' '\n' | tee log
    without 'error|closed' log
    grep 'requests per second' log
}

all_commands() { _benchmark -n "$(size 500 20000)"; }

pipelined() { _benchmark -P 16 -n "$(size 3000 100000)"; }

two_hundred_clients() { _benchmark -c 200 -n "$(size 2000 50000)"; }

large_value() {
    random value "$(size 20 200)"
    [[ $(_cli -x set key < value) == OK ]]
    # A line's end follows the value.
    _cli get key | head -c -1 | cmp - value
}

mass_insertion() {
    local count
    count=$(size 50000 2000000)
    seq "$count" | sed 's/.*/SET key:& value:&\r/' | _cli --pipe | tee log
    grep "^errors: 0, replies: $count$" log
    [[ $(_cli dbsize) == "$count" ]]
}

pub_sub() {
    _cli subscribe news > heard &
    eventually grep -q subscribe heard
    sleep "$(size 3 60)"
    [[ $(_cli publish news late) == 1 ]]
    eventually grep -q late heard
}
