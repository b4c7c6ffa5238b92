#!/bin/sh
# Installs the lunfs program and the links by which mount(8), umount(8) and fstab find it.
#
#   contrib/install.sh [--prefix DIR] [--sbin DIR] [--binary FILE] [--uninstall]
#
# The program goes to PREFIX/sbin (default /usr/local/sbin). mount(8) and umount(8) look for helpers in /sbin
# and /usr/sbin only, so the links go to --sbin (default /sbin; with --prefix given: PREFIX/sbin, for packages
# and trials). DESTDIR is honoured.
set -eu

prefix=/usr/local
sbin=
binary=
uninstall=no
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) prefix=${2:?--prefix needs a directory}; : "${sbin:=$2/sbin}"; shift 2 ;;
        --prefix=*) prefix=${1#*=}; : "${sbin:=$prefix/sbin}"; shift ;;
        --sbin) sbin=${2:?--sbin needs a directory}; shift 2 ;;
        --sbin=*) sbin=${1#*=}; shift ;;
        --binary) binary=${2:?--binary needs a file}; shift 2 ;;
        --binary=*) binary=${1#*=}; shift ;;
        --uninstall) uninstall=yes; shift ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 1 ;;
    esac
done
: "${sbin:=/sbin}"
dest=${DESTDIR:-}
program=$prefix/sbin/lunfs
# A line is added when a subcommand becomes usable under a name of its own.
links="mount.lunfs mount.fuse.lunfs umount.lunfs umount.fuse.lunfs mkfs.lunfs fsck.lunfs"

if [ "$uninstall" = yes ]; then
    for link in $links; do
        # Only what is ours.
        if [ "$(readlink "$dest$sbin/$link" 2>/dev/null)" = "$program" ]; then
            rm -f "$dest$sbin/$link"
        fi
    done
    rm -f "$dest$program"
    exit 0
fi

if [ -z "$binary" ]; then
    root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
    binary=${CARGO_TARGET_DIR:-$root/target}/release/lunfs
fi
if [ ! -x "$binary" ]; then
    echo "install.sh: $binary is missing; run: cargo build --release" >&2
    exit 1
fi
mkdir -p "$dest$prefix/sbin" "$dest$sbin"
# To a new file first: a running daemon keeps the old one.
cp "$binary" "$dest$program.new"
chmod 755 "$dest$program.new"
mv -f "$dest$program.new" "$dest$program"
for link in $links; do
    ln -sf "$program" "$dest$sbin/$link"
done
