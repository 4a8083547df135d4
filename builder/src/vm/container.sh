# Runs a node's image as a container: systemd in namespaces, on the host's kernel.
#
#   container.sh outside DIR    on the host: starts the container, restarts it after a reboot, exits when it stops
#   container.sh inside DIR     in new namespaces: enters the container's control group
#   container.sh system DIR     in a new cgroup namespace: mounts the file systems and executes systemd
#
# The builder (container.rs) writes `settings` and `credentials/` to DIR. The node's data is in `var/` there, and in
# `disk.raw` and `esp/` if the node updates itself.
set -eu
stage=$1 dir=$2
. "$dir/settings"

# Forwards a port of the container to the host's loopback interface.
outwards() {
    until [ -e "$dir/init" ]; do sleep 0.1; done
    read -r pid rest <"$dir/init"
    out="nsenter --net=/proc/$$/ns/net socat STDIO TCP\\:127.0.0.1\\:$1"
    exec nsenter "--net=/proc/$pid/ns/net" socat "TCP-LISTEN:$1,bind=$HOST,fork,reuseaddr" "EXEC:$out"
}

# Forwards a port of the host's loopback interface to the container. Reads the pid for each connection, because it
# changes when the container restarts.
inwards() {
    in="exec nsenter --net=/proc/\$(cut -d' ' -f1 '$dir/init')/ns/net socat STDIO TCP\\:127.0.0.1\\:$2"
    exec socat "TCP-LISTEN:$1,bind=$DOOR,fork,reuseaddr" "SYSTEM:$in"
}

# Reads this process's pid and start time, which together identify it even if the kernel reuses the pid.
identify() {
    read -r pid rest </proc/self/stat
    set -- ${rest##*) }
    shift 19
    began=$1
}

outside() {
    identify
    echo "$pid $began" >"$dir/outside"
    # The pipe is open for reading and writing, so a write to the console does not block while no reader is there.
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
        # A helper that survives would keep the old network namespace alive.
        [ -z "$helpers" ] || kill $helpers || :
        # reboot(2) with a restart in a PID namespace kills its init with SIGHUP: 128 + 1.
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

# Prints a variable of GRUB's environment block.
block() { sed -n "s/^$1=//p" "$dir/esp/grub/grubenv"; }

# Prints the path of an image's boot entry.
entry() {
    for end in .efi +3.efi +3-0.efi +2-1.efi +1-2.efi +0-3.efi; do
        if [ -n "$1" ] && [ -e "$dir/esp/EFI/Linux/$1$end" ]; then
            echo "$dir/esp/EFI/Linux/$1$end"
            break
        fi
    done
}

# Counts boot attempts and selects the entry as GRUB's configuration does (grub.rs). Mounts the root that the entry's
# command line names.
start_disk() {
    slot= chosen= tries=$(block tries)
    if [ "$tries" -gt 0 ]; then
        if [ "$tries" -gt 3 ]; then tries=3; fi
        sed -i "s/^tries=.*/tries=$((tries - 1))/" "$dir/esp/grub/grubenv"
        chosen=$(entry "$(block next)")
    fi
    for image in good next; do
        if [ -z "$chosen" ]; then chosen=$(entry "$(block "$image")"); fi
    done
    hash=$(grep -ao 'roothash=[0-9a-f]\{64\}' "$chosen" | sed 's/roothash=//; q')
    disk=$(losetup --find --show --partscan "$dir/$DISK")
    # Not every kernel reads a GPT, so partx adds the partitions.
    partx --update "$disk"
    # The partition's UUID is the first half of the root hash.
    half=$(echo "$hash" | sed 's/\(.\{8\}\)\(....\)\(....\)\(....\)\(.\{12\}\).*/\1-\2-\3-\4-\5/')
    for part in "$disk"p*; do
        if [ "$(blkid -p -s PART_ENTRY_UUID -o value "$part")" = "$half" ]; then slot=$part; fi
    done
    [ -n "$slot" ] || echo "container.sh: $chosen names no partition of $dir/$DISK" >&2
    mounted=0
    mount -t erofs -o ro "$slot" "$root" || mounted=$?
    # The kernel detaches the device when its last user closes it.
    losetup --detach "$disk"
    return "$mounted"
}

# Creates device nodes and links of the disk, for systemd-sysupdate and the agent. Creates missing partitions first.
show_disk() {
    mount --bind "$dir/esp" "$root/efi"
    mknod -m 600 "$root$disk" b $(stat -c '0x%t 0x%T' "$disk")
    chroot "$root" systemd-repart --dry-run=no --seed="$UUID" --exclude-partitions=var "$disk"
    partx --update "$disk"
    mkdir -p "$root/dev/block" "$root/dev/mapper" "$root/dev/disk/by-partuuid"
    for part in "$disk" "$disk"p*; do
        if [ "$part" != "$disk" ]; then
            mknod -m 600 "$root$part" b $(stat -c '0x%t 0x%T' "$part")
            ln -s "$part" "$root/dev/disk/by-partuuid/$(blkid -p -s PART_ENTRY_UUID -o value "$part")"
        fi
        ln -s "$part" "$root/dev/block/$(printf '%d:%d' $(stat -c '0x%t 0x%T' "$part"))"
    done
    ln -s "$slot" "$root/dev/mapper/root"
    echo "roothash=$hash" >"$root/run/host/cmdline"
    mount --bind "$root/run/host/cmdline" "$root/proc/cmdline"
}

system() {
    identify
    ip link set lo up
    # The interface of the previous start may still exist for a moment.
    ip -n "$WIRE" link delete "$PORT" 2>/dev/null || :
    ip link add wire address "$MAC" type veth peer name "$PORT" netns "$WIRE"
    ip -n "$WIRE" link set "$PORT" master wire up
    if [ -n "$OUTWARDS" ]; then ip address add "$HOST/32" dev lo; fi
    mount --make-rprivate /
    root=$dir/root
    if [ -n "$DISK" ]; then
        start_disk
    else
        mount -t erofs -o "ro,loop,offset=$OFFSET" "$IMAGE" "$root"
    fi
    # wireguard-go creates its socket in /var/run, and may start before systemd-tmpfiles creates the link.
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
    # The kernel is the host's, so the container can write only the settings of its own network namespace.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
    mount -o remount,bind,ro "$root/proc/sys"
    if [ -e "$root/proc/sysrq-trigger" ]; then mount --bind /dev/null "$root/proc/sysrq-trigger"; fi
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
    # Hides the host's firmware, whose variables do not belong to the container.
    mount -t tmpfs -o ro,nosuid,nodev,noexec tmpfs "$root/sys/firmware"
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
    mkdir -p "$root/run/host/credentials"
    mount -t tmpfs -o mode=700,nosuid,nodev,noexec tmpfs "$root/run/host/credentials"
    cp "$dir/credentials/"* "$root/run/host/credentials/"
    touch "$root/run/host/wireguard-go"
    mount --bind "$(command -v wireguard-go)" "$root/run/host/wireguard-go"
    # A new boot id for each start, because the journal separates boots by it.
    cat /proc/sys/kernel/random/uuid >"$root/run/host/boot_id"
    mount --bind "$root/run/host/boot_id" "$root/proc/sys/kernel/random/boot_id"
    if [ -n "$DISK" ]; then show_disk; fi
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
        setpriv --bounding-set=-sys_module,-sys_rawio,-sys_time /usr/lib/systemd/systemd \
        systemd.mask=console-getty.service systemd.mask=systemd-repart.service
}

"$stage"
