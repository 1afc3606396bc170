#!/bin/sh
# Runs inside a Debian tree (see run.sh): the package is installed, the program runs from the
# configuration that it brought, and a purge leaves nothing.
# shellcheck disable=SC2317,SC2329 # functions are called by name
# shellcheck source=tests/init/lib.sh
. /root/lib.sh
start() {
	/usr/sbin/cgtproxy -p /run/cgtproxy.pid >/run/log 2>&1 &
	within 20 [ -s /run/cgtproxy.pid ] || { cat /run/log; return 1; }
}
exec_leaves() { mkdir -p /sys/fs/cgroup/cgtproxy/direct/99999999; }
conf=/etc/cgtproxy/cgtproxy.conf
upgrade=/root/upgrade.deb
[ -e $upgrade ] || upgrade=/root/cgtproxy.deb
files() { find / -xdev -name '*cgtproxy*' ! -path '/root/*' ! -path '/proc/*' ! -path '/sys/*'; }

check "install" dpkg -i /root/cgtproxy.deb
check "files are those of the package" dpkg -V cgtproxy
check "README and examples" [ -s /usr/share/doc/cgtproxy/README.md.gz -a -s /usr/share/doc/cgtproxy/examples/kill-switch.conf ]
check "the units are where they belong" [ -s /usr/lib/systemd/system/cgtproxy.service ]
check "check" /usr/sbin/cgtproxy check
check "run" start
check "the table is there" nft list table inet cgtproxy
echo '# mine' >>$conf
check "upgrade to what $(sed -n "s/^PRETTY_NAME=//p" /etc/os-release) builds" dpkg -i --force-confold "$upgrade"
check "files are those of the package" dpkg -V cgtproxy
check "the configuration is as it was" grep -q '^# mine' $conf
kill "$(cat /run/cgtproxy.pid)"
wait
check "stopped" fails nft list table inet cgtproxy
check "exec leaves a cgroup" exec_leaves
dpkg -r cgtproxy >/run/said 2>&1
check "remove" [ $? -eq 0 ]
check "without a puzzling word" fails grep -iE 'error|fail|unable|not empty|no such' /run/said
check "no cgroup is left" [ ! -e /sys/fs/cgroup/cgtproxy ]
check "keeps the configuration" [ -e $conf ]
check "purge" dpkg -P cgtproxy
left=$(files | grep -v '^/run')
check "nothing is left${left:+: $left}" [ -z "$left" ]
exit $failed
