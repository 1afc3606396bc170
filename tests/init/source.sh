#!/bin/sh
# Runs inside a Debian tree that has what the source package asks for (see run.sh): it is built as
# nobody, who has no network, and lintian has nothing to say of it. What it makes is left in /build.
# shellcheck disable=SC2317,SC2329 # functions are called by name
# shellcheck source=tests/init/lib.sh
. /root/lib.sh
rm -rf /build
mkdir /build
cp /root/source/* /build/
chown -R nobody /build
nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/nonexistent "$@"; }
build() { (cd /build/cgtproxy-*/ && nobody dpkg-buildpackage -us -uc) >/build/log 2>&1 || { tail -30 /build/log; false; }; }

cd /build || exit 1
check "unpack" nobody sh -c 'dpkg-source -x cgtproxy_*.dsc'
check "build by $(rustc --version)" build
check "its tests were run" grep -E 'test result: ok\. [1-9]' /build/log
# the policy that the package follows is newer than the lintian of Debian 12
check "lintian" nobody sh -c 'lintian --fail-on error,warning --suppress-tags newer-standards-version cgtproxy_*.changes'
sed 's/^/       /' /run/check.log
check "a dynamic program" sh -c "dpkg-deb -I /build/cgtproxy_*.deb | grep 'Depends: .*libc6'"
exit $failed
