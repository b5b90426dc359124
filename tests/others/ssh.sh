# Needs: ssh sshd scp sftp rsync git

serve() {
    ssh-keygen -q -t ed25519 -N '' -f host_key
    ssh-keygen -q -t ed25519 -N '' -f id
    # Where Debian's own start of the service puts what sshd wants to be there.
    mkdir -p /run/sshd
    # A shell that sshd starts at the first level reads .bashrc, whatever that takes.
    exec "$(command -v sshd)" -D -e -f /dev/null -h "$PWD/host_key" -p "$LOCAL_PORT" \
        -o "ListenAddress=$LOCAL_HOST" -o "AuthorizedKeysFile=$PWD/id.pub" -o StrictModes=no \
        -o PermitRootLogin=yes -o UsePAM=no -o MaxStartups=200 -o MaxSessions=50 -o PidFile=none \
        -o SetEnv=SHLVL=1 -o 'Subsystem=sftp internal-sftp'
}

cat > config << END
Host there
    HostName ${HOST}
    Port ${PORT}
    User $(id -un)
    IdentityFile $PWD/id
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ControlPath $PWD/master
END
export GIT_SSH_COMMAND="ssh -F $PWD/config"

many_at_once() {
    local count
    count=$(size 20 100)
    seq "$count" | xargs -P "$count" -I {} ssh -F config there 'sleep 1; echo {}' | sort -n | cmp - <(seq "$count")
}

_large() { random large "$(size 30 300)"; }

scp_both_ways() {
    _large
    scp -F config -q large "there:$PWD/up"
    cmp large up
    scp -F config -q "there:$PWD/up" down
    cmp large down
}

rsync_both_ways() {
    mkdir from
    cd from
    _large
    for name in {1..200}; do echo "$name" > "$name"; done
    cd ..
    rsync -a -e "$GIT_SSH_COMMAND" from/ "there:$PWD/up"
    diff -r from up
    rsync -a -e "$GIT_SSH_COMMAND" "there:$PWD/up/" down
    diff -r from down
    # Nothing has changed, so that only sums are sent.
    rsync -a --checksum --itemize-changes -e "$GIT_SSH_COMMAND" from/ "there:$PWD/up" > changes
    [[ ! -s changes ]]
}

sftp_both_ways() {
    _large
    sftp -F config -b - there << END
put large $PWD/up
get $PWD/up down
END
    cmp large up
    cmp large down
}

control_master() {
    ssh -F config -MNf there
    seq 40 | xargs -P 40 -I {} ssh -F config there 'sleep 0.5; echo {}' | sort -n | cmp - <(seq 40)
    _large
    ssh -F config there cat < large | cmp - large
    ssh -F config -O exit there
}

git_clone_and_push() {
    git init -q -b main origin.git --bare
    git clone -q "there:$PWD/origin.git" one
    random one/large "$(size 5 100)"
    git -C one add large
    git -C one -c user.name=a -c user.email=a@example.org commit -qm first
    git -C one push -q origin HEAD:refs/heads/main
    git clone -q "there:$PWD/origin.git" two
    git -C two fsck --strict
    cmp one/large two/large
}
