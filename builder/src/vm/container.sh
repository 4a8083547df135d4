# A node's image as a container: systemd in namespaces of its own, as on a machine, on this host's kernel.
#
#   container.sh outside DIR    on the host: starts it, and again when it restarts; ends with it
#   container.sh inside DIR     in namespaces of its own: enters its control group
#   container.sh system DIR     in one of control groups too: lays the file systems, becomes systemd
#
# DIR has what the start was made of (container.rs): `settings`, `credentials/`; and what the node keeps: `var/`.
set -eu
stage=$1 dir=$2
. "$dir/settings"

# A port of this host's loopback, for those inside.
outwards() {
    until [ -e "$dir/init" ]; do sleep 0.1; done
    read -r pid rest <"$dir/init"
    out="nsenter --net=/proc/$$/ns/net socat STDIO TCP\\:127.0.0.1\\:$1"
    exec nsenter "--net=/proc/$pid/ns/net" socat "TCP-LISTEN:$1,bind=$HOST,fork,reuseaddr" "EXEC:$out"
}

# A port of the inside, on this host's loopback. The pid is another after each start.
inwards() {
    in="exec nsenter --net=/proc/\$(cut -d' ' -f1 '$dir/init')/ns/net socat STDIO TCP\\:127.0.0.1\\:$2"
    exec socat "TCP-LISTEN:$1,bind=$DOOR,fork,reuseaddr" "SYSTEM:$in"
}

outside() {
    # What says something on the console does not wait for who reads it.
    rm -f "$dir/console" "$dir/init"
    mkfifo "$dir/console"
    cat <>"$dir/console" >>"$dir/console.log" &
    for pair in $INWARDS; do inwards "${pair%:*}" "${pair#*:}" & done
    while :; do
        mkdir -p "$CGROUP"
        find "$CGROUP" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null || :
        helpers=
        for port in $OUTWARDS; do
            outwards "$port" &
            helpers="$helpers $!"
        done
        status=0
        unshare --fork --kill-child --pid --mount --uts --ipc --net sh "$0" inside "$dir" || status=$?
        rm -f "$dir/init"
        # Where one stays, the network it is in stays.
        [ -z "$helpers" ] || kill $helpers || :
        # SIGHUP is what a restart in a namespace of processes comes to.
        [ "$status" = 129 ] || break
    done
    find "$CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null || :
    trap '' TERM
    kill -TERM 0
}

inside() {
    echo 0 >"$CGROUP/cgroup.procs"
    exec unshare --cgroup sh "$0" system "$dir"
}

system() {
    read -r pid rest </proc/self/stat
    # By its pid and its start it is found again, and nobody else is.
    set -- ${rest##*) }
    shift 19
    began=$1
    ip link set lo up
    # The one of the last start may be there for a moment.
    ip -n "$WIRE" link delete "$PORT" 2>/dev/null || :
    ip link add wire address "$MAC" type veth peer name "$PORT" netns "$WIRE"
    ip -n "$WIRE" link set "$PORT" master wire up
    if [ -n "$OUTWARDS" ]; then ip address add "$HOST/32" dev lo; fi
    mount --make-rprivate /
    root=$dir/root
    mount -t erofs -o "ro,loop,offset=$OFFSET" "$IMAGE" "$root"
    # There before systemd makes it: WireGuard's program looks for its socket there.
    ln -sfn ../run "$dir/var/run"
    mount --bind "$dir/var" "$root/var"
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
    mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
    for device in null zero full random urandom tty net/tun; do
        mkdir -p "$(dirname "$root/dev/$device")"
        mknod -m 666 "$root/dev/$device" c $(stat -c '0x%t 0x%T' "/dev/$device")
    done
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    for i in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${i%:*}" "$root/dev/${i#*:}"; done
    touch "$root/dev/console"
    mount --bind "$dir/console" "$root/dev/console"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    # The kernel is the host's: nothing in here changes it, but for its own network.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
    mount -o remount,bind,ro "$root/proc/sys"
    if [ -e "$root/proc/sysrq-trigger" ]; then mount --bind /dev/null "$root/proc/sysrq-trigger"; fi
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
    mkdir -p "$root/run/host/credentials"
    mount -t tmpfs -o mode=700,nosuid,nodev,noexec tmpfs "$root/run/host/credentials"
    cp "$dir/credentials/"* "$root/run/host/credentials/"
    touch "$root/run/host/wireguard-go"
    mount --bind "$(command -v wireguard-go)" "$root/run/host/wireguard-go"
    echo "$pid $began" >"$dir/init.new"
    mv "$dir/init.new" "$dir/init"
    cd "$root"
    mkdir run/host/old
    pivot_root . run/host/old
    umount -l /run/host/old
    mount --make-rshared /
    exec </dev/null >/dev/console 2>&1
    exec env -i container=bakehouse "container_uuid=$UUID" CREDENTIALS_DIRECTORY=/run/host/credentials \
        PATH=/usr/sbin:/usr/bin TERM=dumb \
        setpriv --bounding-set=-sys_module,-sys_rawio,-sys_time /usr/lib/systemd/systemd --log-target=console \
        systemd.mask=console-getty.service
}

"$stage"
