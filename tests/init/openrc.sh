#!/bin/sh
# Runs inside a tree with OpenRC and busybox ash (see run.sh): the service from start to stop, with
# another service whose traffic it decides on. A service is asked through one fifo, and answers with
# the result of sending a datagram through another: `sent`, or `denied` where it is dropped.
# shellcheck disable=SC2317,SC2329 # functions are called by name
# this busybox prefers its own applets, which know less
ip() { /sbin/ip "$@"; }
# shellcheck source=tests/init/lib.sh
. /root/lib.sh
CONF=/etc/cgtproxy/cgtproxy.conf

exits() { want=$1; shift; "$@"; rc=$?; echo "exit status $rc"; [ "$rc" -eq "$want" ]; }
asks() { # SERVICE ANSWER
	echo >"/run/$1.ask"
	read -r answer <"/run/$1.answer"
	echo "$1: $answer"
	[ "$answer" = "$2" ]
}
daemon_pid() { /usr/bin/pgrep -x cgtproxy; }
respawned() { new=$(daemon_pid) && [ -n "$new" ] && [ "$new" != "$old" ] && [ "$(cat /run/cgtproxy.pid)" = "$new" ]; }
table() { nft list table inet cgtproxy; }
leftover() { nft list tables; ip rule; ip -6 rule; ip route show table all; }
clean() { leftover; ! leftover | grep -E 'cgtproxy|proto 99|lookup 300'; }
policy() { printf '[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /(openrc\\.)?flood10\n%s\n' "$1" >$CONF; }
DROP='drop = /(openrc\.)?(app|a?flood9?)' WRONG='mihomo = ('
is() { [ "$(daemon_pid)" = "$1" ]; }
another() { new=$(daemon_pid) && [ -n "$new" ] && [ "$new" != "$1" ]; }
says() { "$@" >/run/said 2>&1; rc=$?; cat /run/said; return "$rc"; }
floods() { [ "$(got 11)" -gt 100 ]; }
classified() { nft list set inet cgtproxy cg_drop | grep flood9 && nft list set inet cgtproxy cg_mihomo | grep flood10; }

remote_host
rm -rf /etc/runlevels/sysinit/hwclock* /etc/runlevels/boot/hwclock* /etc/runlevels/*/procps* /etc/runlevels/*/udev*
for name in app other; do
	mkfifo /run/$name.ask /run/$name.answer
	cat >/usr/local/bin/$name <<-EOF
	#!/bin/bash
	while :; do
		read -r <>/run/$name.ask
		if echo x 2>/dev/null >/dev/udp/203.0.113.7/12; then echo sent; else echo denied; fi >/run/$name.answer
	done
	EOF
	cat >/etc/init.d/$name <<-EOF
	#!/sbin/openrc-run
	supervisor=supervise-daemon
	command=/usr/local/bin/$name
	EOF
	chmod +x /usr/local/bin/$name /etc/init.d/$name
done
flooding() { # NAME PORT
	printf '#!/sbin/openrc-run\nsupervisor=supervise-daemon\ncommand=/usr/local/bin/flood\ncommand_args=%s\n' "$2" \
		>"/etc/init.d/$1"
	chmod +x "/etc/init.d/$1"
}
for port in 9 10 11; do flooding flood$port $port; done
# first in the alphabet, which is the order where no other is said
flooding aflood 9
# what Alpine's does: saves the live ruleset when it stops
cat >/etc/init.d/nftables <<-'EOF'
	#!/sbin/openrc-run
	start() { nft add table inet mine; }
	stop() { nft list ruleset >/run/nftables.saved; nft flush ruleset; }
EOF
chmod +x /etc/init.d/nftables
# as OpenRC 0.60 and later, which reads these itself, and refuses what it does not know
# shellcheck disable=SC2016 # for the shell of the services
sed -i '/^supervise_start()/,/^{/s/^{/&\n\t[ -z "$ready$notify" ] || { eerror "invalid: $ready$notify"; return 1; }/' \
	"$(find /lib/rc/sh /usr/lib*/rc/sh -name supervise-daemon.sh 2>/dev/null | head -1)"
grep -q '^rc_cgroup_mode="unified"' /etc/rc.conf || echo 'rc_cgroup_mode="unified"' >>/etc/rc.conf
for name in aflood nftables app; do rc-update -q add $name default; done
# as it says itself
runlevel=$(sed -n 's/.*rc-update add cgtproxy \([a-z]*\);.*/\1/p' /root/install.sh)
rc-update -q add cgtproxy "$runlevel"
policy "$DROP"

openrc sysinit >/run/openrc.log 2>&1
openrc boot >>/run/openrc.log 2>&1
check "boot into the default runlevel" openrc default
echo "       $(openrc --version), $(readlink -f /bin/sh), cgroup of app: $(sed -n s/^0:://p "/proc/$(/usr/bin/pgrep -ox app)/cgroup")"
check "status is started" rc-service cgtproxy status
check "nothing got out at boot" nothing_got_out
rc-service aflood stop >/dev/null 2>&1
check "its table is there when start returns" table
check "a service of the policy is dropped" asks app denied
rc-service other start >/dev/null 2>&1
check "another service is not" asks other sent
rc-service app restart >/dev/null 2>&1
# (its cgroup is a new one)
check "a restarted service is dropped" within 5 asks app denied

old=$(daemon_pid)
kill -9 "$old"
check "dropped while the daemon is dead" asks app denied
check "kill -9: respawned" within 20 respawned
check "dropped after the respawn" asks app denied

policy "$WRONG"
check "reload with an error is refused" fails rc-service cgtproxy reload
check "and the policy stays" asks app denied
policy "$DROP-not"
check "reload" rc-service cgtproxy reload
check "takes the new policy" within 10 asks app sent
check "without a restart" [ "$(daemon_pid)" = "$(cat /run/cgtproxy.pid)" ]

policy "$DROP"
check "and back" rc-service cgtproxy reload
check "takes the old policy" within 10 asks app denied
for port in 9 10 11; do rc-service flood$port start >/dev/null 2>&1; done
check "the floods reach the remote host where nothing holds them" within 10 floods
# a new cgroup's first packets can precede that where others keep the processors busy
check "the other two are classified" within 10 classified
remotely nft reset counters >/dev/null
for n in 1 2 3 4 5; do
	old=$(daemon_pid)
	check "restart" rc-service cgtproxy restart
	check "   by another daemon" another "$old"
done
check "   one alone" [ "$(daemon_pid | wc -w)" = 1 ]
check "   status is started" rc-service cgtproxy status
check "   nothing got out" nothing_got_out
old=$(daemon_pid)
policy "$WRONG"
check "restart with an error is refused" fails says rc-service cgtproxy restart
check "   it says where" grep "cgtproxy.conf:5" /run/said
check "   the daemon goes on" is "$old"
check "   status is started" rc-service cgtproxy status
check "   dropped" asks app denied
rc-service app restart >/dev/null 2>&1
check "   a restarted service is dropped" within 5 asks app denied
check "   nothing got out" nothing_got_out
policy "$DROP"
check "   a corrected file is taken" rc-service cgtproxy restart
check "   by another daemon" another "$old"
old=$(daemon_pid)
kill -9 "$old"
check "kill -9: respawned" within 20 respawned
check "   nothing got out" nothing_got_out
for port in 9 10 11; do rc-service flood$port stop >/dev/null 2>&1; done

check "stop" rc-service cgtproxy stop
check "status is stopped (3)" exits 3 rc-service cgtproxy status
check "nothing is left in the kernel" clean
policy "$WRONG"
check "start with an error is refused" fails rc-service cgtproxy start
cp /run/check.log /run/refused.log
check "and says where" grep "cgtproxy.conf:5" /run/refused.log
check "not started" fails daemon_pid

policy "$DROP"
umount -l /sys/fs/cgroup
check "start without cgroup2 is refused" fails says rc-service cgtproxy start
check "   it says what to do" grep "rc-update add cgroups sysinit" /run/said
check "   no supervisor goes on" fails /usr/bin/pgrep -f 'supervise-daemon cgtproxy'
mount -t cgroup2 none /sys/fs/cgroup
check "start" rc-service cgtproxy start
check "dropped" asks app denied

powered_off() { # as that runlevel does, but for the scripts that end all processes
	openrc boot >/dev/null 2>&1
	openrc default >/dev/null 2>&1
	rc-service aflood status && daemon_pid || return 1
	rm -f /run/nftables.saved
	remotely nft reset counters >/dev/null
	openrc shutdown
	! rc-service cgtproxy status && ! daemon_pid
}
rm -f /etc/runlevels/shutdown/*
check "power-off" powered_off
check "   nftables saved its ruleset" grep -q 'table inet mine' /run/nftables.saved
check "   without our table" fails grep -q cgtproxy /run/nftables.saved
rc-update -q del nftables default
check "power-off without nftables" powered_off
check "   nothing got out" nothing_got_out
exit $failed
