# Needs: mariadbd mariadb-install-db mariadb mariadb-slap mariadb-dump

serve() {
    mariadb-install-db --no-defaults --user=root --datadir="$PWD/data" --skip-test-db \
        --auth-root-authentication-method=normal
    exec mariadbd --no-defaults --user=root --datadir="$PWD/data" --socket="$PWD/socket" \
        --bind-address="$LOCAL_HOST" --port="$LOCAL_PORT" --skip-grant-tables --local-infile=1 \
        --innodb-flush-log-at-trx-commit=0 --max-allowed-packet=1G
}

options=(--no-defaults --protocol=tcp -h "$HOST" -P "$PORT")

_sql() { mariadb "${options[@]}" --max-allowed-packet=1G -N "$@"; }

# The greeting has the version behind five bytes, before the visitor has said anything.
the_service_speaks_first() {
    for _ in {1..50}; do
        exec 3<> "/dev/tcp/$HOST/$PORT"
        head -c 20 <&3 | tail -c +6 | grep -aE '^[0-9]+\.[0-9]+\.'
        exec 3>&-
    done
}

reconnecting() {
    seq 100 | xargs -P 20 -I {} mariadb "${options[@]}" -Ne 'select {}' | sort -n | cmp - <(seq 100)
}

slap() {
    mariadb-slap "${options[@]}" --auto-generate-sql --auto-generate-sql-load-type=mixed --concurrency=50 \
        --number-of-queries="$(size 2000 50000)"
}

load_and_dump() {
    random bytes "$(size 10 150)"
    base64 -w 1000 bytes > lines
    _sql -e 'create database copies; create table copies.copied (number int auto_increment primary key, line text)'
    _sql --local-infile=1 -e "load data local infile 'lines' into table copies.copied (line)"
    _sql --quick -e 'select line from copies.copied order by number' | cmp - lines
    mariadb-dump "${options[@]}" copies > dump
    _sql -e 'create database again'
    _sql again < dump
    _sql --quick -e 'select line from again.copied order by number' | cmp - lines
}
