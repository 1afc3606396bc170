# What the scripts that run inside a tree share (see run.sh, which puts it beside them).
set -u
failed=0

check() { # DESCRIPTION COMMAND...
	what=$1
	shift
	if "$@" >/run/check.log 2>&1; then
		echo "ok     $what"
	else
		echo "FAILED $what"
		sed 's/^/       /' /run/check.log
		failed=1
	fi
}
fails() { ! "$@"; }
within() { # SECONDS COMMAND...: for what nothing announces
	n=$(($1 * 20))
	shift
	until "$@" >/dev/null 2>&1; do
		n=$((n - 1))
		[ $n -gt 0 ] || return 1
		sleep 0.05
	done
}
