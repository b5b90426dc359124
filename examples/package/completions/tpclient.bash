# Written out of `tpclient --help` by `TP_WRITE=1 cargo test --test tunnel package`.
_tpclient() {
    local option=$3
    # Three words are what --option=value is here.
    [[ $option != = ]] || option=${COMP_WORDS[COMP_CWORD - 2]}
    COMPREPLY=()
    case $option in
        --proxy-protocol) mapfile -t COMPREPLY < <(compgen -W 'v1 v2' -- "$2") ;;
        -k | --key-file | --config) compopt -o default ;;
        # Nobody but the user knows a value for these.
        -s | --server | \
            -c | --control-port | \
            --control | \
            -t | --tunnel-port | \
            --tunnel | \
            -l | --local | \
            -p | --pool | \
            -L | --linger | \
            -d | --drain | \
            --status | \
            --ready) ;;
        *) mapfile -t COMPREPLY < <(compgen -W '--server --control-port --control --tunnel-port --tunnel --local --proxy-protocol --pool --key-file --original --check --linger --drain --status --insecure-status --ready --config --verbose --quiet --help --version' -- "$2") ;;
    esac
}
complete -F _tpclient tpclient
