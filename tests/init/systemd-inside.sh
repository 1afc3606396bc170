#!/bin/sh
# Becomes systemd inside a Debian tree (see run.sh), where it starts itself again as a service, tests
# the unit of the package that is installed there, and ends systemd with its result.
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

. /root/lib.sh
pid() { systemctl show -P MainPID cgtproxy; }
respawned() { new=$(pid) && [ "$new" != 0 ] && [ "$new" != "$old" ] && systemctl --quiet is-active cgtproxy; }
asks() { # SLICE WANT: sends a datagram from a new unit in that slice
	answer=$(systemd-run --quiet --wait --pipe --slice="$1.slice" bash -c \
		'if echo x 2>/dev/null >/dev/udp/203.0.113.7/9; then echo sent; else echo denied; fi')
	echo "$answer"
	[ "$answer" = "$2" ]
}
policy() { printf '[tproxy mihomo]\nport = 7893\n[rules]\n%s\n' "$1" >/etc/cgtproxy/cgtproxy.conf; }
DROP='drop = /app\.slice'

ip link add in0 type veth peer name out0
ip addr add 192.0.2.1/24 dev in0
ip link set out0 up
ip link set in0 up
ip route add default dev in0
systemctl start app.slice other.slice
policy "$DROP"
echo "       $(systemctl --version | head -1)"
check "started at boot by the package" systemctl is-active cgtproxy
check "restart" systemctl restart cgtproxy
check "the table is there when restart returns" nft list table inet cgtproxy
check "a unit of the policy is dropped" asks app denied
check "another is not" asks other sent
old=$(pid)
[ "$old" != 0 ] || exit 1
kill -9 "$old"
check "dropped while the daemon is dead" asks app denied
check "kill -9: respawned" within 20 respawned
check "dropped after the respawn" asks app denied
policy "mihomo = ("
check "reload with an error is refused" fails systemctl reload cgtproxy
check "and the policy stays" asks app denied
old=$(pid)
policy "$DROP-not"
check "reload" systemctl reload cgtproxy
check "takes the new policy" within 10 asks app sent
check "without a restart" [ "$(pid)" = "$old" ]
check "one capability" grep -q '^CapEff:.*0000000000001000$' "/proc/$old/status"
check "stop" systemctl stop cgtproxy
check "no table is left" fails nft list table inet cgtproxy
ours() { { ip rule; ip -6 rule; ip route show table all; } | grep -E 'proto 99|lookup 300'; }
check "no rules are left" fails ours
policy "mihomo = ("
check "start with an error is refused" fails systemctl start cgtproxy
exit $failed
