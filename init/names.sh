#!/bin/sh
# names.sh [check]: the packages say of the project what Cargo.toml says: its version, its address and
# who looks after it. Puts these into each of them; with `check`, says where one differs.
set -eu
cd "$(dirname "$0")"
of() { sed -n "s/^$1 = \[*\"\([^\"]*\)\"\]*\$/\1/p" ../Cargo.toml | head -1; }
version=$(of version) home=$(of homepage) who=$(of authors)
rc=0

says() { # FILE EXPRESSION...: lines as they are to be
	file=$1
	shift
	new=$(mktemp)
	for expression in "$@"; do set -- "$@" -e "$expression"; shift; done
	sed "$@" "$file" >"$new"
	if [ "${mode:-}" != check ]; then
		cmp -s "$file" "$new" || cat "$new" >"$file"
	elif ! diff -u "$file" "$new"; then
		echo "init/$file does not say what Cargo.toml does: make names" >&2
		rc=1
	fi
	rm "$new"
}

mode=${1:-}
says alpine/APKBUILD "s|^pkgver=.*|pkgver=$version|" "s|^url=.*|url=\"$home\"|" \
	"s|^maintainer=.*|maintainer=\"$who\"|"
says openwrt/Makefile "s|^PKG_VERSION:=.*|PKG_VERSION:=$version|" "s|^PKG_SOURCE_URL:=.*|PKG_SOURCE_URL:=$home|" \
	"s|^PKG_MAINTAINER:=.*|PKG_MAINTAINER:=$who|" "s|^  URL:=.*|  URL:=$home|"
says openwrt/luci-app-cgtproxy/Makefile "s|^PKG_MAINTAINER:=.*|PKG_MAINTAINER:=$who|"
says debian/control "s|^Maintainer: .*|Maintainer: $who|" "s|^Homepage: .*|Homepage: $home|"
says debian/copyright "s|^Upstream-Contact: .*|Upstream-Contact: $who|" "s|^Source: .*|Source: $home|"
says debian/watch "s|https://[^ ]*|$home|"
# what is new in a version, somebody has to write
case $(head -1 debian/changelog) in
"cgtproxy ($version-"*) ;;
*)
	echo "init/debian/changelog does not begin with version $version" >&2
	rc=1
	;;
esac
exit $rc
