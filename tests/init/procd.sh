#!/bin/sh
# procd.sh PROGRAM (run by busybox ash): the OpenWrt service script under a stand-in of rc.common and
# procd.sh that records what is asked of procd. A record is one line a call; what procd would run is
# run once, to see that its arguments are right.
# shellcheck disable=SC2317 # functions are called by name
set -u
program=$1
here=$(cd "$(dirname "$0")/../.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
failed=0

# what rc.common does with a script: sources it, then calls the action's function
cat >"$dir/rc.common" <<'EOF'
record() { echo "$*" >>"$RECORD"; }
procd_open_instance() { record open; }
procd_close_instance() { record close; }
procd_set_param() { record "param $*"; }
procd_add_reload_trigger() { record "trigger $*"; }
procd_send_signal() { record "signal $*"; }
running() { [ -e "$RUNNING" ]; }
logger() { cat >>"$LOGGED"; }
initscript=$1 action=$2
START= STOP= USE_PROCD= EXTRA_COMMANDS=
. "$initscript"
[ "$USE_PROCD" = 1 ] || exit 99
# of rc.common where USE_PROCD is set
start() { start_service; rc=$?; service_triggers; return $rc; }
reload() { reload_service; }
case " start reload $EXTRA_COMMANDS " in *" $action "*) "$action" ;; *) exit 98 ;; esac
EOF

script() { # ACTION: runs the service script with its program and configuration put in
	: >"$dir/record"
	: >"$dir/logged"
	sed "s|/usr/sbin/cgtproxy|$program|; s|/etc/cgtproxy/cgtproxy.conf|$dir/cgtproxy.conf|; s|/sbin/ujail|$dir/ujail|" \
		"$here/init/openwrt/cgtproxy" >"$dir/script"
	RECORD=$dir/record LOGGED=$dir/logged RUNNING=$dir/running busybox ash "$dir/rc.common" "$dir/script" "$1" >"$dir/out" 2>&1
}
check() {
	what=$1
	shift
	if "$@" >"$dir/check.log" 2>&1; then
		echo "ok     $what"
	else
		echo "FAILED $what"
		cat "$dir/check.log" "$dir/out" "$dir/record" | sed 's/^/       /'
		failed=1
	fi
}
has() { grep -qx "$1" "$dir/record"; }
lacks() { ! grep -q "$1" "$dir/record"; }
fails() { ! "$@"; }
policy() { printf '[tproxy mihomo]\nport = 7893\n[rules]\n%s\n' "$1" >"$dir/cgtproxy.conf"; }

chmod 700 "$dir"
policy 'mihomo = /services/app'
check "parses in busybox ash" busybox ash -n "$here/init/openwrt/cgtproxy"
check "start" script start
check "asks for one instance" [ "$(grep -c '^open$' "$dir/record")$(grep -c '^close$' "$dir/record")" = 11 ]
check "its command" has "param command $program -s -c $dir/cgtproxy.conf"
check "respawn for ever" has "param respawn 3600 5 0"
check "reload by SIGHUP" has "param reload_signal HUP"
check "restart where the file changed" has "param file $dir/cgtproxy.conf"
check "no_new_privs" has "param no_new_privs 1"
check "no capabilities without ujail" lacks "param capabilities"
check "reload trigger" has "trigger cgtproxy"
printf '#!/bin/sh\n' >"$dir/ujail"
chmod +x "$dir/ujail"
check "start with ujail" script start
check "capabilities" has "param capabilities /etc/capabilities/cgtproxy.json"
command=$(sed -n 's/^param command //p' "$dir/record")
check "the command is accepted" $command check
check "the capabilities are JSON" python3 -m json.tool "$here/init/openwrt/cgtproxy.json"
: >"$dir/running"
check "reload while running" script reload
check "sends a signal" has "signal cgtproxy"
check "and starts nothing" lacks open
rm "$dir/running"
check "reload while stopped" script reload
check "starts" has open
policy 'mihomo = ('
check "start with an error is refused" fails script start
check "asks procd for nothing" lacks open
check "says where" grep -q 'cgtproxy.conf:4' "$dir/logged"
: >"$dir/running"
check "reload with an error is refused" fails script reload
check "and sends no signal" lacks signal
check "check says where" fails script check
check "on the terminal" grep -q 'cgtproxy.conf:4' "$dir/out"
exit $failed
