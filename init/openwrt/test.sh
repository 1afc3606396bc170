#!/bin/sh
# What the packages feed runs on what it has built: test.sh PACKAGE VERSION.

case "$1" in
cgtproxy) cgtproxy --version | grep -F "$2" ;;
esac
