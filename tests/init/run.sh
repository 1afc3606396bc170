#!/bin/bash
# run.sh [script|openrc|procd|luci|dsc|systemd|deb|slices|fresh...]: the services under their init systems, LuCI's
# pages and the packages, in containers of debootstrap trees below target/init. Needs root. Exit status
# 1 if anything fails.
# shellcheck disable=SC2317,SC2329 # functions are called by name
# shellcheck disable=SC2015,SC2086 # echo does not fail, and no path here holds a blank
cd "$(dirname "$0")/../.." || exit 1
here=tests/init trees=target/init rc=0
program=target/$(uname -m)-unknown-linux-musl/release/cgtproxy

# the mirror of this machine's own apt
: "${MIRROR:=$(cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null |
	sed -nE 's/^(URIs:|deb( \[.*\])?)[[:space:]]*([^[:space:]]+).*/\3/p' | head -1)}"

tree() { # SUITE PACKAGES NAME: a fresh copy of a cached tree
	local bare=$trees/$1-bare base=$trees/$1-$3
	mkdir -p "$trees"
	if [ ! -e "$bare.done" ]; then
		rm -rf "$bare"
		unshare -m debootstrap --variant=minbase "$1" "$bare" "$MIRROR" >"$bare.log" 2>&1 ||
			{ echo "FAILED debootstrap of $1, see $bare.log"; return 1; }
		echo force-unsafe-io >"$bare/etc/dpkg/dpkg.cfg.d/unsafe"
		touch "$bare.done"
	fi
	if [ ! -e "$base.done" ]; then
		rm -rf "$base"
		cp -a "$bare" "$base"
		cp /etc/resolv.conf "$base/etc/"
		# shellcheck disable=SC2016 # the inner shells expand them
		unshare -m env DEBIAN_FRONTEND=noninteractive sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" sh -c \
			"apt-get update -q && apt-get install -qy --no-install-recommends $1 && apt-get clean"' "$base" "${2//,/ }" \
			>"$base.log" 2>&1 || { echo "FAILED to install $2, see $base.log"; return 1; }
		touch "$base.done"
	fi
	rm -rf "$trees/run"
	cp -a "$base" "$trees/run"
}

inside() { # SCRIPT: puts it into the tree, as what container.sh is to run
	cp "$here/$1" $trees/run/root/test.sh
	cp $here/lib.sh $trees/run/root/
}

# install.sh, as a user of an archive has it
script() {
	local to said
	to=$(mktemp -d)
	it() { DESTDIR=$to INIT=$1 BIN=$program sh init/install.sh "$2"; }
	passes() { # DESCRIPTION COMMAND...
		said=$("${@:2}" 2>&1) && echo "ok     $1" || { echo "FAILED $1"; echo "$said"; rc=1; }
	}
	helps() { sh init/install.sh "$1" | grep 'INIT .*openwrt'; }
	for word in --help -h help; do passes "install.sh $word helps" helps $word; done
	unknown() { ! it openrc frobnicate && said=$(it openrc frobnicate 2>&1) || [[ $said == *--help* ]]; }
	passes "and what it does not know leads there" unknown
	for init in openrc systemd; do
		passes "installs for $init" it $init install
		documented() { diff README.md "$to/usr/share/doc/cgtproxy/README.md" && diff -r conf/examples "$to/usr/share/doc/cgtproxy/examples"; }
		passes "with README and examples" documented
		passes "purges" it $init purge
		nothing() { ! find "$to" -type f | grep .; }
		passes "and leaves no file" nothing
	done
	small() { it openwrt install && ! find "$to/usr/share" -type f | grep .; }
	passes "installs for openwrt, without documentation" small
	passes "purges" it openwrt purge
	passes "and leaves no file" nothing
	rm -r "$to"
}

openrc() {
	for suite in bookworm trixie; do
		echo "OpenRC of Debian $suite"
		tree $suite openrc,procps,busybox-static,nftables,iproute2 openrc || { rc=1; continue; }
		ln -sf busybox $trees/run/bin/sh
		make -s install DESTDIR=$trees/run INIT=openrc || rc=1
		inside openrc.sh
		cp init/install.sh $trees/run/root/
		$here/container.sh $trees/run /root/test.sh || rc=1
	done
}

procd() {
	echo "procd (a stand-in)"
	timeout 180 $here/container.sh / "$PWD/$here/procd.sh" "$PWD/$program" "$PWD" || rc=1
}

# LUCI_DIR is a checkout of LuCI (https://github.com/openwrt/luci), not below /run, /tmp or /dev
luci() {
	echo "LuCI's pages in Chromium"
	[ -e "${LUCI_DIR:-}/modules/luci-base/htdocs" ] || { echo "SKIP   LUCI_DIR names no checkout of LuCI"; return; }
	command -v chromium >/dev/null || { echo "SKIP   no chromium"; return; }
	timeout 600 $here/container.sh / "$PWD/$here/luci.sh" "$PWD/$program" "$PWD" "$LUCI_DIR" "$PWD/$trees/luci" || rc=1
}

systemd() {
	echo "systemd"
	$here/systemd.sh "$program" || rc=1
	for suite in bookworm trixie; do
		echo "systemd of Debian $suite"
		tree $suite systemd-sysv,dbus,nftables,iproute2,procps systemd || { rc=1; continue; }
		packages $suite
		inside systemd-inside.sh
		timeout 180 $here/container.sh $trees/run /root/test.sh || rc=1
		cat $trees/run/root/result || { echo "FAILED systemd did not boot"; rc=1; }
	done
}

# containers of podman and docker under systemd, in slices that rules name
slices() {
	echo "containers under systemd, Debian trixie"
	tree trixie systemd-sysv,dbus,nftables,iproute2,procps,podman,docker.io,docker-cli,busybox-static engines ||
		{ echo "SKIP   no podman and docker to install"; return; }
	make -s install DESTDIR=$trees/run INIT=systemd || rc=1
	inside slices.sh
	timeout 400 $here/container.sh $trees/run /root/test.sh || rc=1
	cat $trees/run/root/result || { echo "FAILED systemd did not boot"; rc=1; }
}

# into the tree: the package of the static program, and the suite's own build, if `dsc` has made it
packages() { # SUITE
	cp target/deb/cgtproxy_*_"$(dpkg --print-architecture)".deb $trees/run/root/cgtproxy.deb
	cp $trees/built-$1/cgtproxy_*.deb $trees/run/root/upgrade.deb 2>/dev/null
}

# the source package, built by the suite's own tools and Rust, where there is no network
dsc() {
	for suite in bookworm:cargo-web,rustc-web trixie:cargo,rustc; do
		echo "source package on Debian ${suite%:*}"
		tree ${suite%:*} ${suite#*:},build-essential,debhelper,pkgconf,libmnl-dev,libnftnl-dev,lintian build || { rc=1; continue; }
		suite=${suite%:*}
		cp -r target/deb/source $trees/run/root/
		inside source.sh
		$here/container.sh $trees/run /root/test.sh || { rc=1; continue; }
		rm -rf $trees/built-$suite
		mkdir $trees/built-$suite
		cp $trees/run/build/*.deb $trees/built-$suite/
	done
}

deb() {
	lintian --fail-on error,warning target/deb/cgtproxy_*_"$(dpkg --print-architecture)".deb && echo "ok     lintian" ||
		{ echo "FAILED lintian"; rc=1; }
	for suite in bookworm trixie; do
		echo "package on Debian $suite"
		tree $suite nftables,iproute2,procps plain || { rc=1; continue; }
		packages $suite
		inside deb.sh
		$here/container.sh $trees/run /root/test.sh || rc=1
	done
}

# README's two commands on Debian 13 as it is, with its own Rust: rust-version is what it says
fresh() {
	echo "build, demo and tests by Debian trixie's own Rust"
	tree trixie cargo,rustc,gcc,make,libc6-dev rust || { rc=1; return; }
	mkdir -p $trees/run/src $trees/run/root/.cargo
	git ls-files | tar -cT - | tar -xC $trees/run/src
	cargo fetch --quiet --locked
	cp -a "${CARGO_HOME:-$HOME/.cargo}/registry" $trees/run/root/.cargo/
	cp /etc/resolv.conf $trees/run/etc/
	: >$trees/fresh.log
	# a mount of its own as the root directory: the tests change how it propagates
	within() {
		# shellcheck disable=SC2016 # the inner shell expands them
		unshare -m sh -c 'mount --bind "$0" "$0" && cd "$0" && exec chroot . "$@"' $trees/run \
			env -i HOME=/root PATH=/usr/sbin:/usr/bin CARGO_NET_OFFLINE=true CI=true sh -c "mount -t proc proc /proc
				mount -t sysfs sysfs /sys; mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t devtmpfs dev /dev; $1"
	}
	passes() { # DESCRIPTION COMMAND
		SECONDS=0
		within "$2" >>$trees/fresh.log 2>&1 && echo "ok     $1, ${SECONDS} s" ||
			{ echo "FAILED $1, see $trees/fresh.log"; tail -5 $trees/fresh.log; rc=1; }
	}
	passes "make demo without root: one line" "setpriv --reuid=65534 --clear-groups make -C /src demo 2>&1 |
		grep '^make: .*root'"
	passes "make builds: $(within 'rustc --version')" 'make -C /src build && /src/target/*-gnu/release/cgtproxy --version'
	passes "a static binary" '! ldd /src/target/*-gnu/release/cgtproxy'
	passes "make demo, with what it installs" 'make -C /src demo'
	passes "all tests compile" 'cd /src && cargo test --locked --no-run'
	passes "the unit tests pass" 'cd /src && cargo test --locked --lib --test config --test encode --test layers'
	for missing in cc:gcc cargo:Rust; do
		mv "$trees/run/usr/bin/${missing%:*}" "$trees/run/root/"
		within 'make -C /src build' 2>&1 | grep -q "^make: .*${missing#*:}" &&
			echo "ok     without ${missing%:*}, one line says what to install" ||
			{ echo "FAILED without ${missing%:*}"; rc=1; }
		mv "$trees/run/root/${missing%:*}" "$trees/run/usr/bin/"
	done
}

for part in "${@:-script openrc procd luci dsc systemd deb slices}"; do for p in $part; do $p; done; done
exit $rc
