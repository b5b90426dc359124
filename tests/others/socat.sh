# Needs: socat

serve() {
    local command
    case $1 in
    the_visitor_ends_first) command=SYSTEM:'sha256sum' ;;
    the_service_ends_first)
        echo hello > greeting
        command='OPEN:greeting,rdonly!!OPEN:got,wronly,creat,append'
        ;;
    both_ways_at_once) command=EXEC:cat ;;
    esac
    exec socat -t 60 "TCP-LISTEN:$LOCAL_PORT,bind=$LOCAL_HOST,fork,reuseaddr" "$command"
}

the_visitor_ends_first() {
    random large "$(size 20 300)"
    socat -t 60 - "TCP:$AT" < large | cmp - <(sha256sum < large)
}

_large_once_the_service_has_ended() {
    eventually grep 'is at EOF' log >&2
    cat large
}

the_service_ends_first() {
    random large "$(size 20 300)"
    touch log
    _large_once_the_service_has_ended | socat -t 60 -d -d -lf log - "TCP:$AT" | cmp - greeting
    # The service may not have written all of it yet.
    eventually cmp got large
}

both_ways_at_once() {
    random large "$(size 20 300)"
    socat -t 60 - "TCP:$AT" < large | cmp - large
}
