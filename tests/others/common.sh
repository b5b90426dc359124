# What every script of this directory finds, in a directory of its own that its `serve` and its case share.
#
# LOCAL, LOCAL_HOST, LOCAL_PORT: where the local service listens.
# AT, HOST, PORT: where it is visited, which is the same or a tunnel to it.
# CACHE: a directory that lasts, for what takes long to build.
#
# A command that fails ends a case, and the case fails.

# What a case has kept in `log` is shown if it fails.
trap '[[ $? == 0 || ! -e log ]] || tail log' EXIT

# The local service, unless the script has one.
serve() { :; }

# The first word, or the second one with TP_OTHERS=1.
size() { if [[ ${TP_OTHERS-} == 1 ]]; then echo "$2"; else echo "$1"; fi; }

# Makes a file of so many MB that cannot be guessed.
random() { head -c "$2M" /dev/urandom > "$1"; }

# Waits until a command succeeds, without a trace of each attempt.
eventually() {
    local -
    set +x
    until "$@"; do sleep 0.1; done
}

# Fails if a line of a file matches.
without() { if grep -Ei "$1" "$2"; then return 1; fi; }
