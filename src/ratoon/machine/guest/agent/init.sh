#!/bin/busybox sh
# The guest's first program: drivers, mounts, then the agent takes over as process 1.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /sysroot
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in $(/bin/busybox cat /modules/boot); do
    /bin/busybox modprobe "$module" || echo "ratoon: cannot load $module"
done
tries=0
until [ -b /dev/vda ] || [ $tries -ge 500 ]; do
    /bin/busybox sleep 0.01
    tries=$((tries + 1))
done
# Without a disk, as where KVM is tried: something that can be the root, and be moved.
/bin/busybox mount -t ext4 -o noatime,discard /dev/vda /sysroot || {
    echo "ratoon: cannot mount the root disk"
    /bin/busybox mount -t tmpfs tmpfs /sysroot
}
/bin/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
/bin/busybox mkdir /sys/fs/cgroup/sandbox /sys/fs/cgroup/agent /sys/fs/cgroup/volumes
# What the sandbox may run leaves the agent room to start something, whatever multiplies there.
echo +pids >/sys/fs/cgroup/cgroup.subtree_control
echo $(($(/bin/busybox cat /proc/sys/kernel/threads-max) * 7 / 8)) >/sys/fs/cgroup/sandbox/pids.max
cd /sysroot
/bin/busybox mkdir -p proc sys dev run
[ -d tmp ] || /bin/busybox mkdir -m 1777 tmp
/bin/busybox mount -t proc proc proc
/bin/busybox mount -t sysfs sysfs sys
/bin/busybox mount -t devtmpfs devtmpfs dev
/bin/busybox mkdir -p dev/pts dev/shm dev/mqueue
/bin/busybox mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts
/bin/busybox mount -t tmpfs -o mode=1777 tmpfs dev/shm
/bin/busybox mount -t mqueue mqueue dev/mqueue
/bin/busybox mount -t cgroup2 cgroup2 sys/fs/cgroup
# Whoever opens one of these has the kernel load what is behind it.
/bin/busybox mkdir -p dev/net
/bin/busybox mknod -m 666 dev/net/tun c 10 200
/bin/busybox mknod -m 666 dev/fuse c 10 229
/bin/busybox mknod -m 660 dev/loop-control c 10 237
/bin/busybox ln -sf /proc/self/fd dev/fd
/bin/busybox ln -sf /proc/self/fd/0 dev/stdin
/bin/busybox ln -sf /proc/self/fd/1 dev/stdout
/bin/busybox ln -sf /proc/self/fd/2 dev/stderr
cd /
# What the kernel does by itself from time to time runs in every fork too, where it is translated
# anew and dirties pages: no neighbour discovery, no compaction in advance.
echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
echo 0 >/proc/sys/vm/compaction_proactiveness
# As on a current Docker host; docs/guest.md says where each of them is from.
while read -r name value; do
    echo "$value" >"/proc/sys/$name"
done <<END
fs/file-max 9223372036854775807
fs/inotify/max_user_watches 524288
fs/protected_fifos 1
fs/protected_regular 2
kernel/pid_max 4194304
net/ipv4/ip_unprivileged_port_start 0
net/ipv4/ping_group_range 0 2147483647
net/ipv4/tcp_max_syn_backlog 1024
vm/max_map_count 1048576
END
ulimit -Hn 524288
ulimit -Sn 1024
ulimit -u unlimited
ulimit -c unlimited
/bin/busybox ip link set lo up
/bin/busybox ip link set eth0 up 2>/dev/null && /bin/busybox ip addr add 10.0.2.15/24 dev eth0
# -I -S: nothing of the environment, no site packages; -B: pages stay clean.
exec /usr/bin/python3.11 -I -S -B -c 'import sys; sys.path.insert(0, "/ratoon"); import guest.agent.__main__ as a; a.main()'
