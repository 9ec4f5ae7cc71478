#!/bin/sh
# The root filesystem of a machine made of namespaces; started by namespaces.py as PID 1 of new
# pid, mount, ipc, uts and cgroup namespaces. Ends by becoming the image's own init.
#
#     namespaces.sh ROOTFS SCRATCH SOCKETS STORAGE TOKEN MIRRORS
#
# They are directories, but for the token's file; the last two may be empty.
set -eu
rootfs=$1
scratch=$2
sockets=$3
storage=$4
token=$5
mirrors=$6

mount -t tmpfs -o mode=755 machine "$scratch"
cd "$scratch"
mkdir lower upper work root
# Overlay's options cannot hold every path.
mount --bind "$rootfs" lower
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work machine root
cd root

# Not this machine's devices, of which the disks are some.
mount -t tmpfs -o mode=755,nosuid dev dev
mkdir dev/pts dev/shm
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
    number=${device#*:}
    mknod -m 666 "dev/${device%%:*}" c "${number%:*}" "${number#*:}"
done
ln -s pts/ptmx dev/ptmx
# An EROFS image on a tmpfs, or before Linux 6.12 on any file system, needs a loop device to be
# mounted. The agent makes the nodes of those that it gets, and they clear themselves.
mknod -m 600 dev/loop-control c 10 237

mount -t tmpfs -o mode=755,nosuid,nodev run run
mkdir run/host
mount --bind "$sockets" run/host
mount --bind "$storage" storage
if [ -n "$token" ]; then
    mkdir -p etc/innkeep
    (umask 077 && cat "$token" >etc/innkeep/token)
fi
if [ -n "$mirrors" ]; then
    mkdir -p etc/innkeep
    cp -R "$mirrors" etc/innkeep/certs.d
fi
[ ! -e /etc/resolv.conf ] || cat /etc/resolv.conf >etc/resolv.conf
# What init mounts; the rest is there already, and /sys is this machine's.
cat >etc/fstab <<'FSTAB'
sysfs /sys sysfs ro,nosuid,nodev,noexec 0 0
devpts /dev/pts devpts nosuid,noexec,gid=5,mode=620,ptmxmode=666 0 0
tmpfs /dev/shm tmpfs nosuid,nodev 0 0
tmpfs /tmp tmpfs nosuid,nodev,mode=1777 0 0
cgroup2 /sys/fs/cgroup cgroup2 nosuid,nodev,noexec 0 0
FSTAB

if pivot_root . mnt 2>/dev/null; then
    cd /
    /bin/busybox umount -l /mnt
    exec /init
fi
# In a chroot, whose root is no mount, there is nothing to pivot.
exec chroot . /init
