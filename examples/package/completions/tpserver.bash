# Written out of `tpserver --help` by `TP_WRITE=1 cargo test --test tunnel package`.
_tpserver() {
    local option=$3
    # Three words are what --option=value is here.
    [[ $option != = ]] || option=${COMP_WORDS[COMP_CWORD - 2]}
    COMPREPLY=()
    case $option in
        -k | --key-file | --config) compopt -o default ;;
        # Nobody but the user knows a value for these.
        -b | --bind | \
            -p | --public | \
            -t | --tunnel | \
            -c | --control | \
            --accept-proxy | \
            --allow | \
            --deny | \
            --max-per-source | \
            -n | --clients | \
            -w | --pair-timeout | \
            -m | --max-conns | \
            -L | --linger | \
            -d | --drain | \
            --status | \
            --ready) ;;
        *) mapfile -t COMPREPLY < <(compgen -W '--bind --public --tunnel --control --accept-proxy --allow --deny --max-per-source --log-visits --clients --pair-timeout --max-conns --key-file --generate-key --insecure --original --linger --drain --status --insecure-status --ready --config --verbose --quiet --help --version' -- "$2") ;;
    esac
}
complete -F _tpserver tpserver
