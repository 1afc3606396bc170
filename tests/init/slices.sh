#!/bin/sh
# Becomes systemd inside a Debian tree with podman and docker (see run.sh), and starts containers there
# as cgtproxy-recipes(7) says: a quadlet and docker's, in slices that rules name.
# shellcheck disable=SC2317,SC2329 # functions are called by name
set -u
if [ "${1:-}" != test ]; then
	cat >/etc/systemd/system/test.service <<-EOT
	[Unit]
	After=multi-user.target
	[Service]
	Type=oneshot
	StandardOutput=file:/root/result
	StandardError=inherit
	ExecStart=/bin/sh $0 test
	ExecStopPost=/usr/bin/systemctl --no-block exit \$EXIT_STATUS
	EOT
	mkdir -p /etc/systemd/system/multi-user.target.wants
	ln -sf ../test.service /etc/systemd/system/multi-user.target.wants/test.service
	systemctl -q mask docker.socket docker.service containerd.service podman.socket 2>/dev/null
	export container=cgtproxy-test
	exec /lib/systemd/systemd --log-target=null --show-status=no
fi

# shellcheck source=tests/init/lib.sh
. "$(dirname "$0")/lib.sh"
remote_host
# what a container is made of: it sends to PORT from its third second on
image=/root/image
mkdir -p $image/usr/local/bin $image/tmp
for file in /bin/bash $(ldd /bin/bash | grep -o '/[^ ]*'); do cp -L --parents "$file" $image/; done
cp /bin/busybox $image/bin/
cp /usr/local/bin/flood $image/usr/local/bin/
cat >$image/usr/local/bin/talk <<'EOT'
#!/bin/bash
/bin/busybox sleep 3
exec /usr/local/bin/flood "$1"
EOT
chmod +x $image/usr/local/bin/talk

cat >/etc/cgtproxy/cgtproxy.conf <<'EOT'
[tproxy mihomo]
port = 7893
[rules]
drop   = /app\.slice
mihomo = /proxied\.slice
mihomo = service:web
EOT
systemctl start cgtproxyd
check "the daemon runs" within 10 nft list table inet cgtproxy
covers() { # TARGET WORDS: a container of that name comes in by a veth for that target
	cgtproxy status >/run/said
	cat /run/said
	grep -E "^veth[^ ]* +$1 +$2" /run/said
}
counted() { cgtproxy status --prometheus | grep "^cgtproxy_gateway_packets_total{[^}]*target=\"$1\"} [1-9]"; }
goes_on() { before=$(got "$1"); within 20 more "$1" "$before"; }
more() { [ "$(got "$1")" -gt $(($2 + 20)) ]; }

echo "       $(podman --version)"
printf '[containers]\npids_limit = 0\n' >/etc/containers/containers.conf
# as in cgtproxy-recipes(7), but with what a host without all controllers needs
quadlet() { # NAME PORT SLICE
	mkdir -p /etc/containers/systemd
	cat >"/etc/containers/systemd/$1.container" <<-EOT
	[Container]
	Rootfs=$image
	Exec=/usr/local/bin/talk $2
	PodmanArgs=--ulimit=nofile=1024:1024 --ulimit=nproc=1024:1024

	[Service]
	${3:+Slice=$3}
	EOT
}
quadlet boxed 9 app.slice
quadlet proxied 10 proxied.slice
quadlet web 10 ""
quadlet free 11 other.slice
systemctl daemon-reload
starts() { systemctl start "$1" || { systemctl status "$1"; journalctl -n 20 -u "$1"; return 1; }; }
for unit in boxed proxied web free; do check "quadlet $unit" starts $unit; done
check "   in its slice: dropped" within 20 covers drop "podman [0-9a-f]{12} +/app.slice/boxed.service"
check "   in its slice: proxied" within 20 covers mihomo "podman [0-9a-f]{12} +/proxied.slice/proxied.service"
check "   by service:web" within 20 covers mihomo "podman [0-9a-f]{12} +/system.slice/web.service"
check "   without a rule it sends" goes_on 11
check "   what is proxied is counted" counted mihomo
check "   what is dropped is counted" counted drop
check "   nothing got out" nothing_got_out
systemctl stop boxed proxied web free
gone() { ! cgtproxy status | grep '^veth'; }
check "   no veth is left" within 20 gone

# shellcheck disable=SC2016 # for docker
dockerd_runs() { docker info -f '{{.CgroupDriver}} {{.CgroupVersion}}' | grep '^systemd 2'; }
systemctl -q unmask docker.socket docker.service containerd.service
systemctl start docker || { systemctl status docker; journalctl -n 30 -u docker; }
check "dockerd, with systemd as its cgroup driver" within 60 dockerd_runs
echo "       docker $(docker info -f '{{.ServerVersion}}'), bridge-nf-call-iptables $(cat /proc/sys/net/bridge/bridge-nf-call-iptables 2>&1)"
imported() { tar -C "$image" -c . | docker import - box; }
check "an image" imported
run() { docker run -d --rm "$@"; }
check "docker in app.slice" run --cgroup-parent=app.slice box /usr/local/bin/talk 9
check "docker in proxied.slice" run --cgroup-parent=proxied.slice box /usr/local/bin/talk 10
check "docker without one" run box /usr/local/bin/talk 11
check "   dropped" within 20 covers drop "docker [0-9a-f]{12} +/app.slice/docker-[0-9a-f]{64}.scope"
check "   proxied" within 20 covers mihomo "docker [0-9a-f]{12} +/proxied.slice/docker-[0-9a-f]{64}.scope"
check "   without a rule it sends" goes_on 11
check "   nothing got out" nothing_got_out
docker ps -q | xargs docker kill >/dev/null
check "   no veth is left" within 20 gone
exit $failed
