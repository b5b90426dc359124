# Needs: mosquitto mosquitto_pub mosquitto_sub

serve() {
    printf '%s\n' "listener $LOCAL_PORT $LOCAL_HOST" 'allow_anonymous true' 'user root' \
        'max_queued_messages 0' 'max_inflight_messages 100' > mosquitto.conf
    exec mosquitto -c mosquitto.conf
}

# Subscribes with these words behind the name of a file for what is heard, and waits until that is so.
_subscribe() {
    stdbuf -oL mosquitto_sub -h "$HOST" -p "$PORT" -d "${@:2}" > "$1" &
    eventually grep '^Subscribed' "$1"
}

_publish() { mosquitto_pub -h "$HOST" -p "$PORT" "$@"; }

# Without its pings, the client would be closed by the broker after 7.5 s.
keep_alive() {
    _subscribe heard -k 5 -t news -C 1
    sleep "$(size 9 60)"
    _publish -t news -m late
    wait $!
    grep '^late$' heard
    grep 'sending PINGREQ' heard
}

exactly_once() {
    local count
    count=$(size 2000 20000)
    _subscribe heard -q 2 -t news -C "$count"
    seq "$count" | _publish -q 2 -t news -l
    wait $!
    grep '^[0-9]*$' heard | cmp - <(seq "$count")
}

large_payload() {
    random payload "$(size 20 200)"
    _publish -r -t large -f payload
    mosquitto_sub -h "$HOST" -p "$PORT" -t large -C 1 -N | cmp - payload
}

# A client that is gone without a word has left a will.
last_will() {
    _subscribe heard -t will -C 1
    local subscriber=$!
    _subscribe other -t other --will-topic will --will-payload died
    kill -KILL $!
    wait $subscriber
    grep '^died$' heard
}
