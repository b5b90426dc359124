# Needs: swaks curl /usr/lib/python3/dist-packages/aiosmtpd

serve() {
    exec /usr/bin/python3 -m aiosmtpd -n -l "$LOCAL" -c aiosmtpd.handlers.Mailbox mail
}

_send() { swaks --server "$HOST" --port "$PORT" --from a@example.org --to b@example.org "$@"; }

one_message() {
    _send --body 'a line that is known'
    grep -r '^a line that is known' mail/new
}

many_at_once() {
    local count
    count=$(size 20 200)
    export -f _send
    seq "$count" | xargs -P 20 -I {} bash -c '_send --silent --body "number {}"'
    grep -rho '^number [0-9]*' mail/new | sort -k 2n | cmp - <(seq -f 'number %g' "$count")
}

large_message() {
    random bytes 15
    base64 bytes > body
    (printf 'Subject: large\n\n'; cat body) > message
    curl -fsS --crlf --mail-from a@example.org --mail-rcpt b@example.org -T message "smtp://$AT"
    sed '1,/^\r*$/d' mail/new/* | tr -d '\r' | cmp - body
}
