#!/bin/sh
# Installs what tests/real runs, one package at a time, so that one that is not to be had costs its
# own cases alone. None of its services is started.
PACKAGES="curl dnsutils iperf3 aria2 git openssl conntrack busybox-static dbus iptables
	shadowsocks-libev v2ray haproxy squid dnsmasq-base unbound
	wireguard-tools wireguard-go openvpn ufw firewalld network-manager keepalived docker.io podman
	docker-compose containernetworking-plugins uidmap crun slirp4netns passt lxc systemd-container"

command -v apt-get >/dev/null || exit 0
missing=
for package in $PACKAGES; do
	dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
		missing="$missing $package"
done
[ -n "$missing" ] || exit 0

policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
fi
apt-get update -qq
for package in $missing; do
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" \
		>/dev/null 2>&1 || echo "fetch: no $package" >&2
done
exit 0
