#!/bin/sh
# luci.sh PROGRAM REPOSITORY LUCI PICTURES: LuCI's pages of cgtproxy in headless Chromium, under LuCI's own
# runtime (LUCI is a checkout of it) and stand-ins of what else a router has: the service as procd.sh
# has it, and luci.py. Services talk, so that what is clicked is seen in packets: telemetry by
# datagrams to port 9; aria2 by a connection that the proxy answers, transmission by one that the
# remote host does. Run by container.sh on this host's own tree.
# shellcheck disable=SC2154 # router.sh sets it
script=$2/init/openwrt/cgtproxy
# shellcheck source=tests/init/router.sh
. "$2/tests/init/router.sh"
luci=$3 pictures=$4
# a router has none of cgroup v1
umount -l /sys
awk '/ - cgroup / { print $5 }' /proc/self/mountinfo | xargs -r umount
mount -t sysfs sysfs /sys
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /dev/shm $dir/home
chmod 1777 /dev/shm
export HOME=$dir/home PYTHONDONTWRITEBYTECODE=1
remote_host
ip -n remote link set lo up
ip -n remote addr add 192.0.2.2/24 dev out0
ip -n remote addr add 203.0.113.7/32 dev lo
cat >$dir/bin/got <<'EOF'
#!/bin/sh
nsenter --net=/run/netns/remote nft list counter inet count "p$1" | sed -n 's/.*packets \([0-9]*\).*/\1/p'
EOF
cat >$dir/bin/flow <<'EOF'
#!/bin/sh
cat "$dir/flow.$1"
EOF
chmod +x $dir/bin/*
# answer.py WORD PORT: answers what comes by TCP, and if PORT is that of a proxy, what is for others
cat >$dir/answer.py <<'EOF'
import socket, sys, threading
word, port = sys.argv[1][:1].encode(), int(sys.argv[2])
def listen(kind):
    s = socket.socket(socket.AF_INET6, kind)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if port == 7893:
        s.setsockopt(socket.SOL_IP, 19, 1)
        s.setsockopt(socket.IPPROTO_IPV6, 75, 1)
    s.bind(("::", port))
    return s
def answer(c):
    with c:
        while c.recv(1):
            c.send(word)
tcp, udp = listen(socket.SOCK_STREAM), listen(socket.SOCK_DGRAM)
tcp.listen()
while True:
    threading.Thread(target=answer, args=[tcp.accept()[0]], daemon=True).start()
EOF
# flow.py FILE: a connection to the remote host, and in a file what has become of it
cat >$dir/flow.py <<'EOF'
import math, os, socket, sys, time
file = sys.argv[1]
connections = answers = longest = 0
while True:
    try:
        s = socket.create_connection(("203.0.113.7", 80), timeout=5)
        connections += 1
        while True:
            begin = time.monotonic()
            s.send(b"?")
            word = s.recv(1).decode()
            if not word:
                break
            answers, longest = answers + 1, max(longest, int(1000 * (time.monotonic() - begin)))
            with open(file + ".new", "w") as new:
                new.write(f"{connections} {answers} {longest} {word}\n")
            os.rename(file + ".new", file)
            time.sleep(0.02 + 0.018 * math.sin(begin / 4))
    except OSError:
        time.sleep(0.1)
EOF
cat >$dir/talk.py <<'EOF'
import os, socket, time
# nobody
os.setuid(65534)
def connected():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("203.0.113.7", 9))
    return s
s = connected()
while True:
    try:
        s.send(b"x" * 100)
    except OSError:
        # ended, where its way has changed
        s = connected()
    time.sleep(0.02)
EOF
nsenter --net=/run/netns/remote python3 $dir/answer.py remote 80 &
remote=$!
service mihomo 50 "python3 $dir/answer.py proxy 7893"
service aria2 60 "python3 $dir/flow.py $dir/flow.aria2"
service transmission 60 "python3 $dir/flow.py $dir/flow.transmission"
service telemetry 60 "python3 $dir/talk.py"
put
: >$dir/rc.d/S19cgtproxy
# LuCI's own
: >$dir/config/luci
cat >$dir/config/network <<'EOF'
config interface 'loopback'
	option proto 'static'
	option device 'lo'

config interface 'lan'
	option proto 'static'
	option device 'br-lan'
EOF
cat >$dir/config/cgtproxy <<'EOF'
config cgtproxy 'main'
	option enabled '1'
	list bypass 'private'

config tproxy 'mihomo'
	option port '7893'

config tproxy 'spare'
	option port '7894'

config rule 'proxies'
	option target 'direct'
	list service 'mihomo'

config rule
	option target 'mihomo'
	list service 'aria2'

config rule
	option target 'spare'
	list service 'rtorrent'
EOF
within 5 test -S $dir/ubus
boot
within 10 grep -q p $dir/flow.aria2 && within 10 grep -q r $dir/flow.transmission
python3 "$repository/tests/init/luci.py" $dir "$repository" "$luci" 8080 &
server=$!
within 10 busybox wget -qO /dev/null http://127.0.0.1:8080/cgi-bin/luci/admin/translations/en
python3 "$repository/tests/init/pages.py" http://127.0.0.1:8080 "$pictures" sh -c || failed=1
check "the pages asked for nothing unknown, and for nothing that they have no right to" fails \
	grep -v '^refused \(uci.get\|uci.set\|cgtproxy.explain\|luci-rpc.getDHCPLeases\)$' $dir/unknown
kill $remote $server
exit "$failed"
