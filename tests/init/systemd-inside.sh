#!/bin/sh
# Becomes systemd inside a Debian tree (see run.sh), where it starts itself again as a service, tests
# the units of the package that is installed there, and ends systemd with its result. With `test` alone
# it is what init/debian/tests runs on a machine where the package is installed.
# shellcheck disable=SC2317,SC2329 # functions are called by name
set -u
if [ "${1:-}" != test ]; then
	dpkg -i /root/cgtproxy.deb >/dev/null 2>&1
	cat >/etc/systemd/system/test.service <<-EOF
	[Unit]
	After=multi-user.target
	[Service]
	Type=oneshot
	StandardOutput=file:/root/result
	StandardError=inherit
	ExecStart=/bin/sh $0 test
	ExecStopPost=/usr/bin/systemctl --no-block exit \$EXIT_STATUS
	EOF
	mkdir -p /etc/systemd/system/multi-user.target.wants
	ln -sf ../test.service /etc/systemd/system/multi-user.target.wants/test.service
	export container=cgtproxy-test
	exec /lib/systemd/systemd --log-target=null --show-status=no
fi

# shellcheck source=tests/init/lib.sh
. "$(dirname "$0")/lib.sh"
# another build of the same version, where there is one
upgrade() {
	for deb in /root/upgrade.deb /root/cgtproxy.deb; do [ ! -e "$deb" ] || { dpkg -i "$deb"; return; }; done
	apt-get install -y --reinstall cgtproxy
}
CONF=/etc/cgtproxy/cgtproxy.conf
pid() { systemctl show -P MainPID cgtproxyd; }
is() { [ "$(pid)" = "$1" ] && kill -0 "$1"; }
another() { new=$(pid) && [ "$new" != 0 ] && [ "$new" != "$1" ] && systemctl --quiet is-active cgtproxyd; }
asks() { # SLICE WANT: sends a datagram from a new unit in that slice
	answer=$(systemd-run --quiet --wait --pipe --slice="$1.slice" bash -c \
		'if echo x 2>/dev/null >/dev/udp/203.0.113.7/12; then echo sent; else echo denied; fi')
	echo "$answer"
	[ "$answer" = "$2" ]
}
policy() { printf '[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /proxied\\.slice\n%s\n' "$1" >$CONF; }
DROP='drop = /app\.slice' WRONG='mihomo = ('
ours() { { ip rule; ip -6 rule; ip route show table all; } | grep -E 'proto 99|lookup 300'; }
journal() { journalctl -u cgtproxy | grep "$1"; }
proposes() { cgtproxy apps --suggest | grep "service:$1\$"; }
takes_proposal() { proposes "$1" >>"$CONF" && systemctl reload cgtproxy; }
counted() { cgtproxy status --prometheus | grep "^cgtproxy_target_packets_total{target=\"$1\"} [1-9]"; }
table() { nft list table inet cgtproxy; }
clean() { ! table && ! ours; }

# what a refused restart or upgrade is to leave, and what follows on it
is_left_alone() { # PID
	check "   it says where" within 5 said_where
	check "   the daemon goes on" is "$1"
	check "   a new unit of the policy is dropped" asks app denied
	check "   nothing got out" nothing_got_out
}
says() { "$@" >/run/said 2>&1; rc=$?; cat /run/said; return "$rc"; }
restarts() { : >/run/said; systemctl restart cgtproxy; }
# by itself, or in what systemctl refers to
said_where() { { cat /run/said; journalctl -n 40 -u cgtproxy; } | grep "cgtproxy.conf:5"; }

floods() { [ "$(got 11)" -gt 100 ]; }

remote_host
systemctl start app.slice proxied.slice other.slice
echo "       $(systemctl --version | head -1)"
check "started at boot by the package" systemctl is-active cgtproxy cgtproxyd
check "   which could ask the kernel how levels count" fails journal "over lo"

# as README leads to a first rule, from the configuration that the package brought
systemd-run --quiet --unit=talker bash -c \
	'while exec 3<>/dev/udp/203.0.113.7/12; do while echo x >&3; do sleep 0.05; done; done'
check "apps has a line for a service that talks" within 5 proposes talker
check "   which a reload takes" takes_proposal talker
check "   and status shows what came to it" within 5 counted mihomo
systemctl stop talker

policy "$DROP"
check "restart" systemctl restart cgtproxy
check "the table is there when restart returns" table
check "a unit of the policy is dropped" asks app denied
check "another is not" asks other sent
for flood in app:9 proxied:10 other:11; do
	systemd-run --quiet --slice="${flood%:*}.slice" --unit="flood-${flood#*:}" flood "${flood#*:}"
done
check "the floods reach the remote host where nothing holds them" within 10 floods

old=$(pid)
kill -9 "$old"
check "dropped while the daemon is dead" asks app denied
check "kill -9: respawned" within 20 another "$old"
check "dropped after the respawn" asks app denied

policy "$WRONG"
check "reload with an error is refused" fails systemctl reload cgtproxy
check "and the policy stays" asks app denied
old=$(pid)
policy "$DROP-not"
systemctl stop flood-9
check "reload" systemctl reload cgtproxy
check "takes the new policy" within 10 asks app sent
check "without a restart" is "$old"
check "one capability" grep -q '^CapEff:.*0000000000001000$' "/proc/$old/status"
policy "$DROP"
check "and back" systemctl reload cgtproxy
check "takes the old policy" within 10 asks app denied
systemd-run --quiet --slice=app.slice --unit=flood-9 flood 9

for n in 1 2 3 4 5; do systemctl restart cgtproxy || echo "FAILED restart $n"; done
check "five restarts: another daemon" another "$old"
check "   nothing got out" nothing_got_out

policy "$WRONG"
old=$(pid)
check "restart with an error is refused" fails restarts
is_left_alone "$old"
policy "$DROP"
check "   a corrected file revives" within 30 another "$old"
check "   the unit too" within 30 systemctl is-active cgtproxy

old=$(pid)
check "upgrade" upgrade
check "   by another daemon" another "$old"
check "   nothing got out" nothing_got_out
policy "$WRONG"
old=$(pid)
check "upgrade with an error is refused" fails says upgrade
is_left_alone "$old"
policy "$DROP"
check "   configured once it is corrected" dpkg --configure cgtproxy
check "   by another daemon" another "$old"
check "   nothing got out" nothing_got_out
systemctl stop flood-9 flood-10 flood-11

check "stop" systemctl stop cgtproxy
check "   nothing is left in the kernel" clean
check "   nor a daemon" fails pgrep -x cgtproxy
policy "$WRONG"
check "start with an error is refused" fails restarts
check "   it says where" within 5 said_where
policy "$DROP"
check "   a corrected file revives" within 30 systemctl is-active cgtproxy
check "   with the policy" asks app denied
old=$(pid)
policy "$WRONG"
check "a restart that is refused, and a stop" fails systemctl restart cgtproxy
check "   stops" systemctl stop cgtproxy
check "   nothing is left in the kernel" within 5 clean
check "   nor a daemon" within 5 fails pgrep -x cgtproxy

policy "$DROP"
check "start" systemctl start cgtproxy
check "exec" cgtproxy exec direct true
check "remove" says dpkg -r cgtproxy
check "   without a puzzling word" fails grep -iE 'error|fail|unable|warning: [^w]' /run/said
check "   nothing is left in the kernel" clean
check "purge" says dpkg -P cgtproxy
check "   no unit is left" fails systemctl cat cgtproxy cgtproxyd
check "   no cgroup is left" [ ! -e /sys/fs/cgroup/cgtproxy ]
exit $failed
