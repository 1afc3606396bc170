#!/bin/bash
# container.sh ROOT SCRIPT [ARG...]: runs SCRIPT (a path inside ROOT, a debootstrap tree, or / for
# this host's own) in mount, pid, net, uts, ipc and cgroup namespaces of its own, with cgroup2 at
# /sys/fs/cgroup. Needs root. Nothing of the host is changed, as long as SCRIPT keeps to /run, /tmp
# and /dev where ROOT is /; else what it writes stays in ROOT.
set -e
root=$1 script=$2
if [ -z "$IN_CONTAINER" ]; then
	cgroups=$(awk '/ - cgroup2 / { print $5; exit }' /proc/self/mountinfo)
	mine=
	# none, or hidden by a later mount
	if [ ! -e "$cgroups/cgroup.procs" ]; then
		mine=$(mktemp -d)
		mount -t cgroup2 none "$mine"
		cgroups=$mine
	fi
	group=$cgroups/container-$$
	mkdir "$group"
	# shellcheck disable=SC2317,SC2329 # by the trap
	away() {
		echo 1 > "$group/cgroup.kill" 2>/dev/null || :
		until find "$group" -depth -type d -exec rmdir {} + 2>/dev/null; do [ -d "$group" ] || break; done
		[ -z "$mine" ] || { umount "$mine" && rmdir "$mine"; }
	}
	# also where whoever called has waited for too long
	trap away EXIT
	( echo $BASHPID > "$group/cgroup.procs"
	  IN_CONTAINER=1 exec unshare -m -p -n -u -i -C -f --kill-child --propagation private bash "$0" "$@" )
	exit
fi
[ "$root" = / ] || mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none run
mount -t tmpfs none tmp
mount -t tmpfs none dev
for n in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 console:5:1; do
	IFS=: read -r name major minor <<<"$n"
	mknod -m 666 "dev/$name" c "$major" "$minor"
done
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
ip link set lo up
if [ "$root" != / ]; then
	mkdir -p .old
	pivot_root . .old
	umount -l /.old
fi
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb LC_ALL=C.UTF-8 /bin/sh "$script" "${@:3}"
