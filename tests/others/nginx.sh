# Needs: nginx curl wrk h2load openssl

serve() {
    local tls=
    if [[ $1 == h2_* ]]; then
        openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -keyout key.pem -out cert.pem
        tls="ssl http2; ssl_certificate cert.pem; ssl_certificate_key key.pem"
    fi
    mkdir site
    head -c 3000 /dev/urandom > site/small
    case $1 in
    download) random site/large "$(size 100 1024)" ;;
    cut_in_the_middle) random site/large 100 ;;
    *) random site/large "$(size 20 300)" ;;
    esac
    # With `ssi on`, nginx leaves out a `<` at the end of a file, which one file of 256 would have.
    echo >> site/large
    cat > nginx.conf << END
user root; worker_processes 2; daemon off; pid nginx.pid; error_log stderr;
events { worker_connections 4096; }
http {
    access_log access.log;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp;
    scgi_temp_path temp; client_max_body_size 0; keepalive_requests 10000000;
    server {
        listen $LOCAL $tls;
        root site;
        location / { dav_methods PUT; }
        location /chunked/ { alias site/; ssi on; ssi_types *; }
        location /forbidden { return 403; }
        location /limited { client_max_body_size 1m; }
    }
}
END
    exec nginx -p "$PWD" -e stderr -c nginx.conf
}

# Gets the small file 200 times, by so many connections.
_get_small() {
    curl -fsS -w '%{stderr}%{num_connects}\n' "${@:2}" "http://$AT/small?[1-200]" > got 2> connects
    for _ in {1..200}; do cat site/small; done | cmp - got
    [[ $(awk '{ n += $1 } END { print n }' connects) == "$1" ]]
}

keep_alive() { _get_small 1; }

connection_close() { _get_small 200 -H 'Connection: close'; }

chunked() {
    curl -fsS -D headers "http://$AT/chunked/large" | cmp - site/large
    grep -i '^transfer-encoding: chunked' headers
    curl -fsSv -T - "http://$AT/up" < site/large 2> log
    grep -i '^> transfer-encoding: chunked' log
    cmp site/large site/up
}

ranges() {
    curl -fsS -r 1000000-1999999 "http://$AT/large" |
        cmp - <(tail -c +1000001 site/large | head -c 1000000)
    curl -fsS -D headers -r 0-9,-10 "http://$AT/large" -o parts
    grep -i '^content-type: multipart/byteranges' headers
    head -c 5000000 site/large > got
    curl -fsS -C - -o got "http://$AT/large"
    cmp site/large got
}

continue_100() {
    local expect=(-H 'Expect: 100-continue' --expect100-timeout 3600)
    curl -fsSv "${expect[@]}" -T site/large "http://$AT/up" 2> log
    grep '^< HTTP/1.1 100 Continue' log
    cmp site/large site/up
    curl -sS "${expect[@]}" -T site/large -o page -w '%{http_code} %{size_upload}' "http://$AT/forbidden" > result
    [[ $(< result) == '403 0' ]]
}

upload() {
    curl -fsS -T site/large "http://$AT/up"
    cmp site/large site/up
}

# The answer comes while the visitor still sends.
early_refusal() {
    for _ in {1..20}; do
        curl -sS -H 'Expect:' -T site/large -o page -w '%{http_code}' "http://$AT/limited" > result
        [[ $(< result) == 413 ]]
    done
}

download() {
    curl -fsS --limit-rate "$(size 50M 200M)" "http://$AT/large" | cmp - site/large
}

# The service must notice the cut: it logs that it has sent less.
cut_in_the_middle() {
    local whole got
    whole=$(stat -c %s site/large)
    curl -sS --limit-rate 5M -o got "http://$AT/large" &
    eventually test -s got
    kill -KILL $!
    wait $! || [[ $? == 137 ]]
    got=$(stat -c %s got)
    ((0 < got && got < whole))
    eventually awk -v whole="$whole" '$10 < whole { less = 1 } END { exit !less }' access.log
    curl -fsS -C - -o got "http://$AT/large"
    cmp site/large got
}

_wrk() {
    wrk -t 2 -c 64 -d "$(size 2 20)" "$@" "http://$AT/small" | tee log
    without 'Socket errors|Non-2xx' log
}

load_kept() { _wrk; }

load_closed() { _wrk -H 'Connection: close'; }

_h2load() {
    local requests
    requests=$(size 5000 200000)
    h2load -n "$requests" -c 50 "$@" | tee log
    grep " $requests succeeded, 0 failed, 0 errored, 0 timeout" log
    grep "^status codes: $requests 2xx" log
}

load_h2load() { _h2load --h1 "http://$AT/small"; }

h2_load() { _h2load -m 10 "https://$AT/small"; }

h2_get() {
    curl -fsSk --http2 --parallel --parallel-max 50 -w '%{http_version}\n' -o 'got.#1' "https://$AT/small?[1-200]" > versions
    [[ $(sort versions | uniq -c | xargs) == '200 2' ]]
    for number in {1..200}; do cmp site/small "got.$number"; done
    curl -fsSk --http2 "https://$AT/large" | cmp - site/large
}

h2_upload() {
    curl -fsSk --http2 -w '%{http_version}' -T site/large "https://$AT/up" > version
    [[ $(< version) == 2 ]]
    cmp site/large site/up
}
