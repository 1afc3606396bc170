#!/bin/sh
# What reads the repository without running it (`make lint`): rustfmt, clippy, shellcheck and mandoc, and
# whether the packages say the same of the project.
# A tool that is missing is installed. One that is not to be had costs its own part alone, which is a
# SKIP line, and under CI=true a failure.
cd "$(dirname "$0")/.." || exit 1
rc=0

failed() { echo "FAILED lint: $1"; rc=1; }
skip() { # PART WHY
	[ "${CI:-}" != true ] || { failed "$1: $2"; return; }
	echo "SKIP: lint: $1: $2"
}
has() { "$@" >/dev/null 2>&1; }
package() { # NAME...: from the distribution
	[ "$(id -u)" = 0 ] || return 1
	if has command -v apt-get; then
		has apt-get update -qq && DEBIAN_FRONTEND=noninteractive has apt-get install -y -qq --no-install-recommends "$@"
	else
		has apk add --quiet "$@"
	fi
}
component() { # COMPONENT PACKAGE: a part of Rust, of the same release as rustc
	if has command -v rustup; then has rustup component add "$1"; else package "$2"; fi
}

if has cargo fmt --version || component rustfmt rustfmt && has cargo fmt --version; then
	cargo fmt --check || failed "cargo fmt"
	cargo fmt --check --manifest-path tests/fuzz/Cargo.toml || failed "cargo fmt of tests/fuzz"
else
	skip "cargo fmt" "no rustfmt"
fi

if has cargo clippy --version || component clippy rust-clippy && has cargo clippy --version; then
	cargo clippy --quiet --locked --all-targets -- -D warnings || failed "cargo clippy"
	# nothing is linked, so that any path will do, and no C++ compiler is needed
	if has cargo fetch --locked --manifest-path tests/fuzz/Cargo.toml; then
		CUSTOM_LIBFUZZER_PATH=/dev/null cargo clippy --quiet --locked --manifest-path tests/fuzz/Cargo.toml \
			--target-dir "${CARGO_TARGET_DIR:-target}" -- -D warnings || failed "cargo clippy of tests/fuzz"
	else
		skip "cargo clippy of tests/fuzz" "unable to fetch libfuzzer-sys"
	fi
else
	skip "cargo clippy" "no clippy"
fi

# whatever says in its first line that a shell runs it, whatever its name, and what others source
scripts() {
	find .ci conf init tests -path tests/fuzz -prune -o -type f -print0 |
		xargs -0 awk 'FNR == 1 && (/^#!.*(sh|openrc-run|rc[.]common)/ || FILENAME ~ /(\.(sh|bash)|APKBUILD)$/) { print FILENAME }'
}
if has command -v shellcheck || package shellcheck; then
	# no name here holds a blank
	# shellcheck disable=SC2046
	shellcheck --external-sources $(scripts) || failed shellcheck
else
	skip "shellcheck" "no shellcheck"
fi

if has command -v mandoc || package mandoc; then
	# which other manuals this host has does not matter
	for page in conf/man/*.[0-9]; do
		said=$(mandoc -T lint "$page" 2>/dev/null | grep -v 'referenced manual not found')
		[ -z "$said" ] || { echo "$said"; failed "mandoc of $page"; }
	done
else
	skip "manual pages" "no mandoc"
fi

init/names.sh check || failed "names of the packages"
exit $rc
