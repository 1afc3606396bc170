#!/bin/bash
# systemd.sh PROGRAM: the units as far as it can be held without booting systemd (a container in which
# it boots needs a cgroup2 tree with the controllers free, which not every host gives): they verify,
# and the daemon is not exposed.
# shellcheck disable=SC2317,SC2329 # functions are called by name
set -u
cd "$(dirname "$0")/../.." || exit 1
program=$PWD/$1 failed=0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
check() {
	local what=$1
	shift
	if "$@" >"$dir/log" 2>&1; then echo "ok     $what"; else
		echo "FAILED $what"
		sed 's/^/       /' "$dir/log"
		failed=1
	fi
}
command -v systemd-analyze >/dev/null || { echo "SKIP   no systemd-analyze"; exit 0; }
verify() {
	cp /dev/null "$dir/said"
	for unit in init/systemd/*.service; do
		sed "s|/usr/sbin/cgtproxy|$program|; /^Documentation/d" "$unit" >"$dir/${unit##*/}"
	done
	systemd-analyze verify "$dir"/*.service >"$dir/said" 2>&1
	! grep cgtproxy "$dir/said"
}
check "systemd-analyze verify" verify
exposure() { systemd-analyze security --offline=yes --threshold=20 "$unit"; }
unit=init/systemd/cgtproxyd.service
check "exposure of at most 2.0" exposure
echo "       $(systemd-analyze security --offline=yes $unit | tail -1)"
exit $failed
