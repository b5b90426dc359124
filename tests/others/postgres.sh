# Needs: psql pgbench setpriv /usr/lib/postgresql/*/bin/postgres

export PGHOST=$HOST PGPORT=$PORT PGUSER=postgres PGDATABASE=postgres
PATH=$(echo /usr/lib/postgresql/*/bin | tr ' ' :):$PATH

serve() {
    local as_its_user=(setpriv --reuid postgres --regid postgres --clear-groups)
    mkdir data
    chown postgres: data
    "${as_its_user[@]}" initdb -D data -A trust -U postgres --no-locale --no-sync
    echo 'host all all 127.0.0.0/8 trust' >> data/pg_hba.conf
    exec "${as_its_user[@]}" postgres -D data -p "$LOCAL_PORT" -c "listen_addresses=$LOCAL_HOST" \
        -c unix_socket_directories= -c dynamic_shared_memory_type=mmap -c fsync=off
}

_bench() {
    eventually pg_isready -q
    pgbench -i -q -s "$(size 1 10)"
    for mode in simple extended prepared; do
        pgbench -M "$mode" -c 10 -j 2 -T "$(size 1 20)" "$@" | tee log
        grep '^number of failed transactions: 0 ' log
    done
}

bench() { _bench; }

bench_reconnecting() { _bench -C; }

copy_both_ways() {
    eventually pg_isready -q
    random bytes "$(size 15 150)"
    base64 -w 1000 bytes > lines
    psql -qc 'create table copied (line text)'
    psql -qc '\copy copied from lines'
    psql -qc '\copy copied to back'
    cmp lines back
}

# The request to cancel comes by a connection of its own, which the server closes without an answer.
cancel() {
    eventually pg_isready -q
    psql -c 'select pg_sleep(3600)' 2> log &
    local asleep="select 1 from pg_stat_activity where wait_event = 'PgSleep'"
    eventually eval "psql -Atc \"$asleep\" | grep 1"
    kill -INT $!
    wait $! || [[ $? == 1 ]]
    grep 'canceling statement due to user request' log
    [[ -z $(psql -Atc "$asleep") ]]
}

listen_notify() {
    eventually pg_isready -q
    mkfifo commands
    psql -qAt < commands > heard &
    exec 3> commands
    echo "listen news; select 'ready';" >&3
    eventually grep ready heard
    sleep "$(size 3 60)"
    psql -qc "notify news, 'late'"
    # psql looks for news when it has had an answer.
    echo "select 'asked';" >&3
    eventually grep 'asked' heard
    eventually grep '"news" with payload "late"' heard
}
