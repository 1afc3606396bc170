#!/bin/sh
# procd.sh PROGRAM REPOSITORY [SCRIPT]: the OpenWrt service from boot to removal, under a stand-in of
# rc.common (here) and of procd, ubusd and logd (procd.py), with services whose packets are counted
# on the wire. Run by container.sh on this host's own tree.
# shellcheck disable=SC2317,SC2329 # functions are called by name
# shellcheck disable=SC2086,SC2031 # no path here holds a blank, and a change of PKG_UPGRADE is to be lost
script=${3:-$2/init/openwrt/cgtproxy}
# shellcheck source=tests/init/router.sh
. "$2/tests/init/router.sh"
# a file of the administrator's own
manual() { printf "config cgtproxy 'main'\n\toption manual '1'\n\toption conffile '%s'\n" $dir/cgtproxy.conf >$dir/config/cgtproxy; }
manual
policy() { printf '[tproxy mihomo]\nport = 7893\n[rules]\n%s\n' "$1" >$dir/cgtproxy.conf; }
POLICY='drop = /services/(early|app|new|late|control)
mihomo = /services/nikki'
other_pid() { new=$(daemon_pid) && [ -n "$new" ] && [ "$new" != "$old" ]; }
same_pid() { [ "$(daemon_pid)" = "$old" ]; }
left() { # PORT...: the packets that left for these ports
	sum=0
	for port in "$@"; do
		n=$(nft list chain netdev count in | sed -n "s/.*dport $port counter packets \([0-9]*\).*/\1/p")
		sum=$((sum + n))
	done
	echo $sum
}
none_left() { n=$(left 9 11 12); echo "$n packets of dropped and proxied services left"; [ "$n" -eq 0 ]; }
some_left() { before=$(left 10); within 5 more_left; }
more_left() { [ "$(left 10)" -gt "$before" ]; }
table() { nft list table inet cgtproxy; }
logged() { grep -c "$1" $dir/log; }
once() { within 5 logged "$1"; n=$(logged "$1"); echo "$n times: $1"; [ "$n" -eq 1 ]; }
silent() { cat $dir/out $dir/err; [ ! -s $dir/out ] && [ ! -s $dir/err ]; }
leftover() { nft list tables; ip rule; ip -6 rule; ip route show table all; }
clean() { leftover; ! leftover | grep -E 'cgtproxy|proto 99|lookup 300'; }

# the wire: what arrives at out0 has left
ip link add in0 type veth peer name out0
ip link set out0 up
ip addr add 192.0.2.1/24 dev in0
nft -f - <<-EOF
	table netdev count {
		chain in {
			type filter hook ingress device out0 priority 0
			udp dport 9 counter
			udp dport 10 counter
			udp dport 11 counter
			udp dport 12 counter
			udp dport 13 counter
		}
	}
EOF
cat >$dir/talk.py <<-'EOF'
	import socket, sys, time
	s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
	while True:
	    try:
	        s.sendto(b"x", ("203.0.113.7", int(sys.argv[1])))
	    except OSError:
	        pass
	    time.sleep(0.003)
EOF
talk() { service "$1" "$2" "python3 $dir/talk.py $3" "${4:-}"; }
# busybox prefers its own applet, which knows less
ip=$(command -v ip)
# netifd: forgets all ip rules, and lo comes up later than everything else
cat >$dir/init.d/network <<-EOF
	START=20
	boot() {
		$ip rule flush; $ip rule add pref 32766 lookup main
		$ip link set in0 up
		$ip route add default dev in0
		$ip neigh add 203.0.113.7 lladdr 02:00:00:00:00:01 dev in0
		$ip route add 203.0.113.7 dev in0
		( sleep 0.5; $ip link set lo up ) &
	}
EOF
talk early 13 11
talk nikki 15 12 nikki
talk app 50 9
talk other 50 10
# installed, and not enabled
talk new 60 9
talk late 60 9
rm $dir/rc.d/S60new $dir/rc.d/S60late
put
: >$dir/rc.d/S20network
: >$dir/rc.d/"S$(sed -n 's/^START=//p' $dir/init.d/cgtproxy)cgtproxy"
chmod 700 $dir
policy "$POLICY"
ip link set lo down
# pids of four digits: with those logd cuts off the tag of whoever sends no timestamp
echo 2000 >/proc/sys/kernel/ns_last_pid
within 5 test -S $dir/ubus

check "boot" boot
check "another service talks" some_left
check "a boot with lo late: nothing of dropped and proxied services left" none_left
check "its lines have their tag in logd" once '^daemon.notice cgtproxy\[[0-9]*\]: started: '
check "nothing is asked that does nothing" fails grep "does nothing" $dir/log
proxied() { ip rule | grep 'lookup 300' && ip route show table 300 | grep local; }
check "routes follow when lo is up" within 5 proxied

for action in start restart reload; do
	old=$(daemon_pid)
	policy "$POLICY
mihomo = ("
	: >$dir/log
	check "$action with an error is refused" fails run cgtproxy $action
	check "says why on standard error" grep 'cgtproxy.conf:6' $dir/err
	check "and once in the log" once 'cgtproxy.conf:6'
	check "and the daemon stays" same_pid
	check "and so does its policy" table
	check "check says it too" fails run cgtproxy check
	policy "$POLICY"
done
sleep 0.2
check "nothing left meanwhile" none_left

old=$(daemon_pid)
check "reload" run cgtproxy reload
check "without a restart" same_pid
check "start of what runs changes nothing" run cgtproxy start
check "by the same daemon" same_pid
stands_still() { grep '^State:.T' "/proc/$(daemon_pid)/status"; }
for action in start reload; do
	kill -STOP "$(daemon_pid)"
	check "it stands still" within 5 stands_still
	check "$action of one that stands still" run cgtproxy $action
	check "has it go on" within 5 fails stands_still
done
check "restart" run cgtproxy restart
check "brings another daemon" other_pid
check "which is ready when restart returns" test "$(cat $dir/run/cgtproxy.pid)" = "$(daemon_pid)"
old=$(daemon_pid)
kill -9 "$old"
check "kill -9: another within three seconds" within 3 other_pid
check "nothing left through restart and kill -9" none_left

# the service's first packet, while the daemon is busy elsewhere
kill -STOP "$(daemon_pid)"
check "a service that is new starts" run new start
sleep 0.3
check "nothing of it left before it was looked at" none_left
talk control 60 13
rm $dir/rc.d/S60control
run control start
leaked() { [ "$(left 13)" -gt 0 ]; }
check "which is the cgroup's doing that was made before: without, packets leave" within 5 leaked
kill -CONT "$(daemon_pid)"
run new stop
run control stop
rm $dir/init.d/control

# packages: what default_postinst and default_prerm do around our scripts
scripts() { # postinst or prerm: our script of the feed's Makefile
	awk -v "start=define Package/cgtproxy/$1" '$0 == start { on = 1; next } /^endef/ { on = 0 } on' \
		"$repository/init/openwrt/Makefile" | sed "s/[$][$]/$/g; s|/etc/init.d/cgtproxy|act|g; s|/usr/sbin/cgtproxy|$dir/cgtproxy|
			s|/usr/libexec/|$dir/|; s|/var/run/|$dir/run/|; s/^exit 0//" >$dir/"$1"
}
scripts postinst
scripts prerm
# shellcheck disable=SC1090,SC2030,SC2034 # our scripts read both, and are to change nothing here
ours() { ( IPKG_INSTROOT='' PKG_UPGRADE=${PKG_UPGRADE:-}; . $dir/"$1" ); }
act() {
	run cgtproxy "$1"
	set -- $?
	cat $dir/out $dir/err >>$dir/told
	return $1
}
prerm() { [ "${PKG_UPGRADE:-}" = 1 ] || act disable; act stop; }
postinst() { [ "${PKG_UPGRADE:-}" = 1 ] || act enable; act start; }
replace() { cp $dir/cgtproxy $dir/cgtproxy.new; mv $dir/cgtproxy.new $dir/cgtproxy; }
upgrade() { # opkg or apk
	export PKG_UPGRADE=1
	: >$dir/told
	case $1 in
	opkg) ours prerm; prerm; replace; ours postinst; postinst ;;
	apk) replace; postinst; ours postinst ;;
	esac
	unset PKG_UPGRADE
	cat $dir/told
	[ ! -s $dir/told ]
}
remove() {
	: >$dir/told
	case $1 in
	opkg) ours prerm; prerm ;;
	apk) prerm; ours prerm ;;
	esac >>$dir/told 2>&1
	cat $dir/told
	[ ! -s $dir/told ]
}
is_new() { readlink "/proc/$(daemon_pid)/exe"; [ "$(readlink "/proc/$(daemon_pid)/exe")" = $dir/cgtproxy ]; }
enabled() { ls $dir/rc.d/S??cgtproxy; }
told_once() { cat $dir/told; [ "$(grep -c "$1" $dir/told)" -eq 1 ]; }
made() {
	for file in "$dir"/run/cgtproxy.* "$dir/var/cgtproxy" "$dir/conf.d"; do
		[ ! -e "$file" ] || { echo "$file"; return 0; }
	done
	[ -L $dir/cgtproxy.conf ]
}
for manager in opkg apk; do
	run cgtproxy enable
	old=$(daemon_pid)
	check "upgrade by $manager, in silence" upgrade $manager
	check "the new program runs" is_new
	check "which is another process" other_pid
	check "nothing left during the upgrade" none_left
	old=$(daemon_pid)
	policy "$POLICY
mihomo = ("
	: >$dir/log
	check "upgrade by $manager with an error is not silent" fails upgrade $manager
	check "it says why, once" told_once 'cgtproxy.conf:6'
	check "and once in the log" once 'cgtproxy.conf:6'
	check "and the daemon stays" same_pid
	policy "$POLICY"
	check "put right, restart" run cgtproxy restart
	check "brings the new one" is_new
	check "nothing left meanwhile" none_left
	run cgtproxy disable
	check "upgrade by $manager of what is disabled and runs" upgrade $manager
	check "it runs still, the new one" is_new
	check "and is disabled still" fails enabled
	check "nothing left during that upgrade" none_left
	for name in early app nikki; do run $name stop; done
	# as a script leaves it that is killed half-way through a hand-over
	kill -STOP "$(daemon_pid)"
	check "stop of one that stands still" run cgtproxy stop
	check "nothing is in the kernel when stop returns" clean
	check "stop again, in silence" run cgtproxy stop
	check "which it is" silent
	check "upgrade by $manager of what does not run" upgrade $manager
	check "it does not run" fails daemon_pid
	policy "$POLICY"
	sed -i '1i [global]\non-exit = keep' $dir/cgtproxy.conf
	check "start" run cgtproxy start
	run cgtproxy enable
	check "removal by $manager, without a word" remove $manager
	check "leaves nothing in the kernel" clean
	check "nor in rc.d" fails enabled
	check "nor what the service has made" fails made
	policy "$POLICY"
	check "start" run cgtproxy start
	for name in early app nikki; do run $name start; done
done
check "nothing left since" none_left
# each request takes longer than procd waits before it starts what has ended
touch $dir/slow
check "shutdown" run cgtproxy shutdown
rm $dir/slow
check "the policy stays to the end" table
check "nothing left during shutdown" none_left

# a trigger of a config that is not there never fires
triggers() { ubus call service list >$dir/list && jsonfilter -s "$(cat $dir/list)" -e '@.cgtproxy.triggers[*]'; }
live_triggers() { for t in $(triggers | grep -v ^interface); do [ -e $dir/config/$t ] || { echo "trigger of /etc/config/$t"; return 1; }; done; }
triggered() { triggers | grep -x "$1"; }
check "start" run cgtproxy start
check "no trigger that never fires" live_triggers
check "a change of its configuration reloads it" triggered cgtproxy

# UCI in front
uci_policy() { # RULE: more of it
	cat >$dir/config/cgtproxy <<-EOT
		config cgtproxy 'main'
		config tproxy 'mihomo'
		 	option port '7893'
		config rule
			option target 'drop'
			list service 'early'
			list service 'app'
			list match '/services/(new|late|control)'
		config rule
			option target 'mihomo'
			list service 'nikki'
		$1
	EOT
}
applied() { run cgtproxy reload && within 5 logged "$1"; }
ended() { ! daemon_pid; }
for name in early app nikki; do run $name start; done
old=$(daemon_pid)
uci_policy ''
rm $dir/cgtproxy.conf
touch $dir/slow
check "from a file to UCI" run cgtproxy reload
rm $dir/slow
check "by another daemon" other_pid
of_uci() { tr '\0' ' ' <"/proc/$(daemon_pid)/cmdline" | grep "var/cgtproxy/cgtproxy.conf"; }
check "with the file that was made of it" of_uci
check "which cgtproxy finds by itself" grep 'mihomo = service:nikki' $dir/cgtproxy.conf
for action in start restart reload; do
	old=$(daemon_pid)
	uci_policy "config rule 'wrong'
		option target 'mihmo'
		list service 'app'"
	: >$dir/log
	check "UCI with an error: $action is refused" fails run cgtproxy $action
	check "says where in UCI on standard error" grep 'cgtproxy.wrong: undefined target "mihmo"' $dir/err
	check "and once in the log" once 'cgtproxy.wrong: undefined'
	check "and the daemon stays" same_pid
	check "and so does the file" fails grep mihmo $dir/var/cgtproxy/cgtproxy.conf
	check "why is kept for whoever asks" grep mihmo $dir/run/cgtproxy.refused
done
printf "config interface 'lan'\n\toption proto 'static'\n\toption device 'br-lan'\n" >$dir/config/network
uci_policy "config gateway
	option target 'drop'
	list network 'lan'"
: >$dir/log
check "a gateway of a network" applied reloaded
check "by the same daemon" same_pid
check "its device is in force" table
in_table() { nft list table inet cgtproxy | grep "$1"; }
check "in the kernel" in_table br-lan
check "that it comes up is heard of" triggered interface.lan
check "what was refused is forgotten" fails ls $dir/run/cgtproxy.refused
: >$dir/log
check "it comes up" run cgtproxy refresh
sleep 0.3
check "as it was, which is no reason to reload" fails logged reloaded
sed -i s/br-lan/eth9/ $dir/config/network
check "it comes up with another device" run cgtproxy refresh
check "which is" within 5 in_table eth9
check "nothing left since" none_left
for name in early app nikki; do run $name stop; done
uci_policy ''
sed -i "1a\\\toption enabled '0'" $dir/config/cgtproxy
check "disabled" run cgtproxy reload
check "it ends" within 5 ended
check "and leaves nothing" clean
check "start of what is disabled does nothing" run cgtproxy start
check "and says so" grep disabled $dir/err
check "a change is heard of still" triggered cgtproxy
uci_policy ''
check "enabled again" run cgtproxy reload
check "it runs" table
check "removal" remove apk
check "leaves nothing that was made of UCI" fails made
check "start" run cgtproxy start
manual
rm $dir/cgtproxy.conf
policy "$POLICY"
check "from UCI to a file" run cgtproxy reload
for name in early app nikki; do run $name start; done

# procd of old
touch $dir/old
pid_of() { ubus call service list '{}' >$dir/list && jsonfilter -s "$(cat $dir/list)" -e "@.$1.instances[*].pid"; }
in_cgroup() { grep "^0::$2\$" "/proc/$(pid_of "$1")/cgroup"; }
kill "$(pid_of nikki)"
check "an old procd starts a service again in the root cgroup" within 10 in_cgroup nikki /
named() { run cgtproxy check; cat $dir/out; grep 'warning: nikki (pid' $dir/out; }
check "check names it" named
: >$dir/log
run cgtproxy reload
check "and so does the log, once" once 'nikki (pid'
run nikki stop
# the cgroups that are made before would have it do so at the first start already
check "restart" run cgtproxy restart
check "a service that is new starts" run late start
check "in its own cgroup" within 5 in_cgroup late /services/late/instance1
none_of_it() { n=$(left 9); echo "$n packets of dropped services left"; [ "$n" -eq 0 ]; }
check "and nothing of it leaves" none_of_it
rm $dir/old
run late stop

# a router without cgroup v2
run cgtproxy stop
umount /sys/fs/cgroup
: >$dir/log
check "start without cgroup2 fails" fails run cgtproxy start
# the host's own mounts are out of reach, but still listed
none='no cgroup2\|unable to use cgroup root\|above the root of our cgroup namespace'
check "and says why" grep "$none" $dir/err
run late start
check "a service starts in the root cgroup" within 5 in_cgroup late /
fails run cgtproxy check
check "where all are, which check does not blame on procd" fails grep 'in the root cgroup' $dir/out
run late stop
sleep 4
check "the log has it once, after seconds" once "$none"
quiet() { cat $dir/log; [ "$(wc -l <$dir/log)" -le 3 ]; }
check "and not much else" quiet
if [ "$(uname -m)" = x86_64 ]; then
	for hours in 1 2; do
		: >$dir/log
		check "$hours hours later" python3 "$repository/tests/init/later.py" "$(daemon_pid)" $((hours * 3600))
		check "the log has it again" within 40 grep "$none" $dir/log
		sleep 2
		check "once" once "$none"
		check "and not much else" quiet
	done
fi
mount -t cgroup2 none /sys/fs/cgroup
run cgtproxy reload
check "once it is mounted, it starts" within 10 table
exit $failed
