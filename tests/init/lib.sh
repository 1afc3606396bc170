# What the scripts that run inside a tree share (see run.sh, which puts it beside them).
# shellcheck shell=sh disable=SC2034 # they read what it sets
set -u
failed=0

check() { # DESCRIPTION COMMAND...
	what=$1
	shift
	if "$@" >/run/check.log 2>&1; then
		echo "ok     $what"
	else
		echo "FAILED $what"
		sed 's/^/       /' /run/check.log
		failed=1
	fi
}
fails() { ! "$@"; }
within() { # SECONDS COMMAND...: for what nothing announces
	n=$(($1 * 20))
	shift
	until "$@" >/dev/null 2>&1; do
		n=$((n - 1))
		[ $n -gt 0 ] || return 1
		sleep 0.05
	done
}

# A remote host behind a veth pair: a network namespace that counts every datagram to ports 9, 10 and
# 11 that gets out.
remote_host() {
	ip netns add remote
	ip link add in0 address 02:00:00:00:00:01 type veth peer name out0 address 02:00:00:00:00:02 netns remote
	ip -n remote link set out0 up
	ip addr add 192.0.2.1/24 dev in0
	ip -6 addr add 2001:db8:1::1/64 dev in0 nodad
	ip link set in0 up
	ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev in0
	ip -6 neigh add 2001:db8:1::2 lladdr 02:00:00:00:00:02 dev in0
	ip route add 203.0.113.0/24 via 192.0.2.2
	ip -6 route add 2001:db8:2::/64 via 2001:db8:1::2 dev in0
	remotely nft -f - <<-EOT
	table inet count {
		counter p9 { }
		counter p10 { }
		counter p11 { }
		chain in {
			type filter hook prerouting priority -300
			udp dport 9 counter name p9
			udp dport 10 counter name p10
			udp dport 11 counter name p11
		}
	}
	EOT
}
remotely() { nsenter --net=/run/netns/remote "$@"; }
got() { # PORT: datagrams that the remote host got there
	remotely nft list counter inet count "p$1" | sed -n 's/.*packets \([0-9]*\).*/\1/p'
}
# Datagrams to a port as fast as they go, each by a socket of its own, by turns of either family.
cat >/usr/local/bin/flood <<'EOS'
#!/bin/bash
exec 2>/dev/null
while :; do for host in 203.0.113.7 2001:db8:2::7; do echo x >/dev/udp/$host/$1; done; done
EOS
chmod +x /usr/local/bin/flood
nothing_got_out() { # floods of a dropped service (9) and of a proxied one (10)
	echo "$(got 9) datagrams of a dropped service got out, $(got 10) of a proxied one"
	[ "$(got 9)" = 0 ] && [ "$(got 10)" = 0 ]
}
