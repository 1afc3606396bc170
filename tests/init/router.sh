# What a router of OpenWrt is, as far as the service of cgtproxy sees it: sourced by procd.sh and luci.sh,
# whose first arguments are PROGRAM and REPOSITORY, and which set `script`, the service. A stand-in of
# rc.common (here), of procd, ubusd and logd (procd.py) and of uci (uci.py). rc.common's part is what the
# real one does with a script: it reads it, then puts its own start, stop and reload over the script's.
# shellcheck shell=sh disable=SC2086,SC2034,SC2154,SC2317,SC2329 # no path here holds a blank
program=$1 repository=$2
# procd is the first process, and ends with the test
if [ $$ -eq 1 ]; then
	mkdir -p /run/openwrt
	sh "$0" "$@" &
	exec python3 "$repository/tests/init/procd.py" serve /run/openwrt $!
fi
# shellcheck source=tests/init/lib.sh
. "$repository/tests/init/lib.sh"
dir=/run/openwrt
mkdir -p $dir/bin $dir/init.d $dir/rc.d $dir/run $dir/config
cp "$repository/tests/init/procd.py" $dir/
cp "$program" $dir/cgtproxy
export dir PATH=$dir/bin:$PATH

cat >$dir/rc.common <<'EOF'
initscript=$1 action=$2
name=${initscript##*/}
name=${name#S[0-9][0-9]}
words() { for word in "$@"; do printf " '%s'" "$word"; done; echo; }
procd_open_instance() { count=$((count + 1)); words instance "${1:-instance$count}" >>$asked; }
procd_close_instance() { :; }
procd_set_param() {
	case $1 in
	reload_signal) words param "$1" "$(kill -l "$2")" ;;
	*) words param "$@" ;;
	esac >>$asked
}
procd_add_jail() { words param jail "$@" >>$asked; }
procd_add_reload_trigger() { words trigger "$@" >>$asked; }
procd_add_interface_trigger() { shift; words trigger interface."$1" >>$asked; }
procd_send_signal() { ask signal "$1" "$(kill -l "${3:-HUP}")"; }
# with $dir/slow, longer under way than procd waits before it starts what has ended
ask() {
	case $1 in set | delete) [ ! -e $dir/slow ] || sleep 2 ;; esac
	python3 $dir/procd.py ask $dir "$@"
}
start_service() { :; }
stop_service() { :; }
service_triggers() { :; }
start() { :; }
stop() { :; }
reload() { restart; }
boot() { start; }
shutdown() { stop; }
restart() { trap '' TERM; stop; trap - TERM; start; }
enable() { [ -z "$START" ] || : >$dir/rc.d/S$START$name; }
disable() { rm -f $dir/rc.d/S??$name; }
. "$initscript"
if [ -n "$USE_PROCD" ]; then
	# whatever start_service returns, the service is closed with what was opened
	start() {
		asked=$(mktemp) count=0
		start_service
		service_triggers
		ask set "$name" <$asked
		rm $asked
		if type service_started >/dev/null 2>&1; then service_started; fi
	}
	stop() {
		stop_service
		ask delete "$name"
		if type service_stopped >/dev/null 2>&1; then service_stopped; fi
	}
	reload() { if type reload_service >/dev/null 2>&1; then reload_service; else start; fi; }
	running() {
		[ "$(jsonfilter -s "$(ubus call service list "{ \"name\": \"$name\" }")" -e "@.$name.instances[*].running")" = True ]
	}
fi
case " start stop restart reload boot shutdown enable disable running $EXTRA_COMMANDS " in
*" $action "*) $action ;;
*) exit 98 ;;
esac
EOF
for tool in ubus jsonfilter; do
	case $tool in ubus) where=" $dir" ;; *) where= ;; esac
	printf '#!/bin/sh\nexec python3 %s/procd.py %s%s "$@"\n' $dir $tool "$where" >$dir/bin/$tool
done
printf '#!/bin/sh\nexec python3 %s -c %s "$@"\n' "$repository/tests/init/uci.py" $dir/config >$dir/bin/uci
printf '#!/bin/sh\nexec busybox logger "$@"\n' >$dir/bin/logger
# a line a call: busybox's logger takes an argument or standard input
chmod +x $dir/bin/*

run() { # NAME ACTION: as an admin does
	busybox ash $dir/rc.common $dir/init.d/"$1" "$2" >$dir/out 2>$dir/err
}
put() { # what a package brings: the service script with its paths put in
	for from in "$script:init.d/cgtproxy" "$repository/init/openwrt/uci:cgtproxy-uci" \
		"$repository/init/openwrt/luci-app-cgtproxy/root/usr/libexec/rpcd/cgtproxy:rpcd"; do
		sed "s|/usr/sbin/cgtproxy|$dir/cgtproxy|; s|/etc/cgtproxy/|$dir/|; s|/usr/libexec/|$dir/|; s|/etc/config/|$dir/config/|
			s|/var/etc/|$dir/var/|; s|/var/run/|$dir/run/|; s|/etc/init.d|$dir/init.d|" "${from%%:*}" >$dir/"${from#*:}"
		chmod +x $dir/"${from#*:}"
	done
}
service() { # NAME START COMMAND INSTANCE
	printf 'START=%s\nUSE_PROCD=1\nstart_service() {\n\tprocd_open_instance %s\n\tprocd_set_param command %s\n\tprocd_set_param respawn 3600 5 5\n}\n' \
		"$2" "${4:-}" "$3" >$dir/init.d/"$1"
	: >$dir/rc.d/S"$2$1"
}
daemon_pid() { ubus call service list '{"name":"cgtproxy"}' >$dir/list && jsonfilter -s "$(cat $dir/list)" -e '@.cgtproxy.instances[*].pid'; }
boot() {
	for link in "$dir"/rc.d/S*; do
		service=${link##*/S??}
		busybox ash $dir/rc.common $dir/init.d/"$service" boot >>$dir/boot.log 2>&1
	done
}
