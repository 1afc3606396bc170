#!/bin/sh
# install.sh [install | uninstall | purge]: puts cgtproxy where the init system finds it, or removes
# it; purge removes the configuration too. A configuration that is there is never overwritten. These
# are taken from the environment:
#
#   INIT        openwrt, openrc, systemd or auto (default: what this host runs)
#   DESTDIR     stage below this directory; nothing is started or stopped then
#   PREFIX      default /usr; SYSCONFDIR: default /etc
#   BIN         the program; default: beside this script
set -eu

case ${1:-} in
-h | --help | help)
	sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
	exit
	;;
esac

: "${INIT:=auto}" "${DESTDIR:=}" "${PREFIX:=/usr}" "${SYSCONFDIR:=/etc}"
here=$(cd "$(dirname "$0")" && pwd)
# in an unpacked archive this script is beside conf/, in the source tree it is in init/
[ -d "$here/conf" ] || here=$(dirname "$here")
: "${BIN:=$here/cgtproxy}"
program=$PREFIX/sbin/cgtproxy
config=$SYSCONFDIR/cgtproxy/cgtproxy.conf configured=$here/conf/cgtproxy.conf

die() {
	echo "install.sh: $*" >&2
	exit 1
}

if [ "$INIT" = auto ]; then
	if [ -e /etc/openwrt_release ]; then INIT=openwrt
	elif [ -d /run/systemd/system ]; then INIT=systemd
	elif [ -x /sbin/openrc-run ]; then INIT=openrc
	else die "unable to tell the init system: set INIT to openwrt, openrc or systemd"
	fi
fi

# What is installed: SOURCE DESTINATION MODE
case $INIT in
openwrt) services="openwrt/cgtproxy $SYSCONFDIR/init.d/cgtproxy 755
openwrt/uci $PREFIX/libexec/cgtproxy-uci 755
openwrt/cgtproxy.defaults $SYSCONFDIR/uci-defaults/cgtproxy 644
openwrt/cgtproxy.keep /lib/upgrade/keep.d/cgtproxy 644"
	config=$SYSCONFDIR/config/cgtproxy configured=$here/init/openwrt/cgtproxy.config
	# its pages, where there is LuCI
	[ ! -d "$DESTDIR/www/luci-static/resources" ] || services="$services
$(cd "$here/init" && find openwrt/luci-app-cgtproxy/htdocs openwrt/luci-app-cgtproxy/root -type f |
		sed 's|.*/htdocs\(/.*\)|& /www\1 644|; s|.*/root\(/.*\.json\)$|& \1 644|; s|.*/root\(/[^ ]*\)$|& \1 755|')" ;;
openrc) services="openrc/cgtproxy $SYSCONFDIR/init.d/cgtproxy 755" ;;
systemd) units=${UNITDIR:-/usr/lib/systemd/system}
	services="systemd/cgtproxy.service $units/cgtproxy.service 644
systemd/cgtproxyd.service $units/cgtproxyd.service 644
systemd/cgtproxy-stop.service $units/cgtproxy-stop.service 644" ;;
*) die "INIT is openwrt, openrc, systemd or auto, not $INIT" ;;
esac

# LuCI and rpcd hear of pages that come and go.
pages_changed() {
	[ -d /www/luci-static/resources ] && [ -x "$SYSCONFDIR/init.d/rpcd" ] || return 0
	rm -f /tmp/luci-indexcache*
	"$SYSCONFDIR/init.d/rpcd" reload
}

# put SOURCE DESTINATION MODE: replaced in one step, so that what runs is not disturbed
put() {
	mkdir -p "$DESTDIR$(dirname "$2")"
	case $1 in
	"$BIN") cp "$1" "$DESTDIR$2.new" ;;
	*) sed "s|/usr/sbin/cgtproxy|$program|g; s|/etc/cgtproxy/|$SYSCONFDIR/cgtproxy/|g" \
		"$1" > "$DESTDIR$2.new" ;;
	esac
	chmod "$3" "$DESTDIR$2.new"
	mv -f "$DESTDIR$2.new" "$DESTDIR$2"
}

# keep SOURCE DESTINATION: as put, unless the user has one already
keep() {
	if [ -e "$DESTDIR$2" ]; then echo "$2 is kept"; else put "$1" "$2" 644; fi
}

# Manual pages, documentation and completion for bash; routers have neither man nor bash, nor the room.
docs=$PREFIX/share/doc/cgtproxy
extras() {
	[ "$INIT" != openwrt ] || return 0
	echo "$here/README.md $docs/README.md 644"
	for example in "$here"/conf/examples/*; do echo "$example $docs/examples/${example##*/} 644"; done
	for page in "$here"/conf/man/*.[0-9]; do
		echo "$page $PREFIX/share/man/man${page##*.}/${page##*/} 644"
	done
	echo "$here/conf/completion/cgtproxy.bash $PREFIX/share/bash-completion/completions/cgtproxy 644"
}

do_install() {
	[ -f "$BIN" ] || die "no program at $BIN: run make, or set BIN"
	put "$BIN" "$program" 755
	echo "$services" | while read -r from to mode; do put "$here/init/$from" "$to" "$mode"; done
	extras | while read -r from to mode; do put "$from" "$to" "$mode"; done
	[ "$INIT" != openrc ] || keep "$here/init/openrc/cgtproxy.confd" "$SYSCONFDIR/conf.d/cgtproxy"
	keep "$configured" "$config"
	[ -z "$DESTDIR" ] || return 0
	[ "$INIT" != openwrt ] || { sh "$SYSCONFDIR/uci-defaults/cgtproxy"; pages_changed; }
	echo "Installed. Edit $config, then:"
	case $INIT in
	openwrt) echo "  /etc/init.d/cgtproxy enable; /etc/init.d/cgtproxy restart" ;;
	openrc) echo "  rc-update add cgtproxy boot; rc-service cgtproxy start" ;;
	systemd) systemctl daemon-reload && echo "  systemctl enable --now cgtproxy" ;;
	esac
}

do_uninstall() {
	if [ -z "$DESTDIR" ] && [ -x "$program" ]; then
		case $INIT in
		openwrt) "$SYSCONFDIR/init.d/cgtproxy" stop; "$SYSCONFDIR/init.d/cgtproxy" disable ;;
		openrc) rc-service --ifstarted cgtproxy stop; rc-update --quiet --all del cgtproxy >/dev/null 2>&1 ;;
		systemd) systemctl --quiet disable --now cgtproxy ;;
		esac || echo "install.sh: the service could not be stopped" >&2
		# also what on-exit = keep has left
		"$program" flush || echo "install.sh: see above, something is left in the kernel" >&2
		[ "$INIT" != openwrt ] || "$PREFIX/libexec/cgtproxy-uci" forget || :
	fi
	echo "$services" | while read -r _ to _; do rm -f "$DESTDIR$to"; done
	extras | while read -r _ to _; do rm -f "$DESTDIR$to"; done
	rm -rf "$DESTDIR${docs:?}" "$DESTDIR$program"
	[ -z "$DESTDIR" ] || return 0
	case $INIT in
	openwrt) pages_changed ;;
	systemd) systemctl daemon-reload ;;
	esac
}

case ${1:-install} in
install) do_install ;;
uninstall) do_uninstall ;;
purge)
	do_uninstall
	rm -rf "$DESTDIR$SYSCONFDIR/cgtproxy"
	[ "$INIT" != openwrt ] || rm -f "$DESTDIR$config"
	rm -f "$DESTDIR$SYSCONFDIR/conf.d/cgtproxy"
	;;
*) die "install, uninstall or purge, not $1 (--help)" ;;
esac
