#!/bin/sh
# Installs lunfs as contrib/install.sh does, then mounts by mount(8) and fstab. Runs in a mount namespace of its
# own, with copies of /usr/sbin and /usr/local/sbin mounted over them: nothing outside is touched.
#
#   unshare --mount --propagation private sh install_and_mount.sh BINARY INSTALLER SCRATCH
set -eu

binary=$1
installer=$2
scratch=$3
export LUNFS_RUN_DIR="$scratch/run"
cd "$scratch"
mkdir run one two sbin local

sbin=$(readlink -f /sbin)
cp -a "$sbin/." sbin/
mount --bind sbin "$sbin"
mkdir -p /usr/local/sbin
mount --bind local /usr/local/sbin

say() { echo "-- $*"; }
fail() {
    echo "install_and_mount: $*" >&2
    exit 1
}
# Whatever happens, no daemon stays.
finish() {
    status=$?
    trap - EXIT
    cd /
    for dir in "$scratch/one" "$scratch/two"; do
        umount -i "$dir" 2>/dev/null || true
    done
    for lock in "$LUNFS_RUN_DIR"/*.lock; do
        pid=$(cut -d' ' -f1 "$lock" 2>/dev/null || true)
        if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = lunfs ]; then
            kill "$pid" || true
        fi
    done
    exit "$status"
}
trap finish EXIT

say install
sh "$installer" --binary "$binary"
for link in mount.lunfs mount.fuse.lunfs umount.lunfs umount.fuse.lunfs mkfs.lunfs; do
    [ "$(readlink "/sbin/$link")" = /usr/local/sbin/lunfs ] || fail "/sbin/$link is no link to the program"
done

say mkfs
mkfs -t lunfs --quiet --size 256M "$scratch/image" || fail "mkfs -t lunfs"

say mount -t lunfs
out=$(mount -t lunfs -o host=one "$scratch/image" one 2>&1) || fail "mount -t lunfs: $out"
[ -z "$out" ] || fail "a success is silent: $out"
echo first >one/file
findmnt -n -o FSTYPE one | grep -qx fuse.lunfs || fail "the type is $(findmnt -n -o FSTYPE one)"
mount -o remount,ro "$scratch/one" || fail "remount,ro"
if (echo x >one/other) 2>/dev/null; then fail "writable after remount,ro"; fi
mount -o remount,rw "$scratch/one" || fail "remount,rw"
echo second >>one/file

say fstab
cat >fstab <<EOF
# as it would stand in /etc/fstab
$scratch/image $scratch/two lunfs host=two,_netdev,noatime,x-systemd.requires=network.target 0 0
$scratch/image $scratch/none lunfs noauto,host=none 0 0
EOF
mount -T "$scratch/fstab" -a || fail "mount -a"
[ "$(cat two/file)" = "$(printf 'first\nsecond')" ] || fail "the second host sees: $(cat two/file)"
mount -T "$scratch/fstab" -a || fail "mount -a once more"
[ "$(grep -c "$scratch/two " /proc/self/mountinfo)" = 1 ] || fail "mounted twice"

say umount
umount two || fail "umount two"
umount "$scratch/one" || fail "umount one"
states=$(lunfs status --json "$scratch/image" | tr ',' '\n' | grep '"state"' | sort | uniq -c | tr -s ' ')
[ "$states" = ' 2 "state":"left"' ] || fail "after umount: $states"
for lock in run/*.lock; do
    pid=$(cut -d' ' -f1 "$lock")
    # Ended, and perhaps not yet looked at by its parent.
    case $(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null) in '' | Z* | X*) continue ;; esac
    fail "umount returned before the daemon $pid was gone"
done

say mount -t fuse.lunfs
mount -t fuse.lunfs -o ro "$scratch/image" one || fail "mount -t fuse.lunfs"
[ "$(head -n1 one/file)" = first ] || fail "the file is gone"
umount one || fail "umount"

say uninstall
sh "$installer" --uninstall
[ ! -e /sbin/mount.lunfs ] && [ ! -e /usr/local/sbin/lunfs ] || fail "something stayed after --uninstall"
echo "all of it worked"
