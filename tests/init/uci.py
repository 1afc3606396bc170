#!/usr/bin/env python3
"""A stand-in for uci of OpenWrt, as far as cgtproxy-uci asks it.

    uci.py [-q] [-N] [-c DIR] [-P CHANGES] export CONFIG
    uci.py [-q] [-N] [-c DIR] get CONFIG.SECTION.OPTION

It reads and prints what the real one was seen reading and printing: words and quotes as a shell has
them, values of several lines, the place of a mistake, and `Entry not found`, with exit status 1.
"""
import getopt
import os
import sys


def fail(reason):
    if not quiet:
        print(f"uci: {reason}", file=sys.stderr)
    sys.exit(1)


def words(text):
    """Lists of words, a command each, with their lines."""
    found, word, quote, line, i = [], None, None, 1, 0
    while i < len(text):
        c = text[i]
        i += 1
        if quote:
            if c == quote:
                quote = None
            elif c == "\\" and quote == '"' and i < len(text):
                word, i = word + text[i], i + 1
            else:
                word += c
            line += c == "\n"
            continue
        if c in "'\"":
            quote, word = c, word or ""
        elif c in " \t\n;#":
            if word is not None:
                found.append(word)
                word = None
            if c == "#":
                while i < len(text) and text[i] != "\n":
                    i += 1
            if c in "\n;":
                if found:
                    yield line, found
                found = []
                line += c == "\n"
        elif c == "\\" and i < len(text):
            word, i = (word or "") + text[i], i + 1
        else:
            word = (word or "") + c
    if quote:
        last = text.splitlines(keepends=True)
        fail(f"Parse error (EOF with unterminated {quote}) at line {len(last)}, byte {len(last[-1])}")
    if word is not None:
        found.append(word)
    if found:
        yield line, found


def read(config):
    """Sections as [type, name, {option: value or list}]."""
    try:
        text = open(os.path.join(where, config)).read()
    except OSError:
        fail("Entry not found")
    sections = []
    for line, (kind, *rest) in words(text):
        if kind == "package":
            continue
        if kind == "config" and 1 <= len(rest) <= 2:
            kind, name = rest[0], rest[1] if len(rest) > 1 else ""
            same = [s for s in sections if name and s[1] == name]
            if not same:
                sections.append([kind, name, {}])
            current = (same or sections)[-1]
        elif kind in ("option", "list") and len(rest) == 2:
            if not sections:
                fail(f"Parse error ({kind} command found before the first section) at line {line}, byte 0")
            if not rest[0].replace("_", "").isalnum():
                fail(f"Parse error (invalid character in name field) at line {line}, byte 0")
            if kind == "option":
                current[2][rest[0]] = rest[1]
            else:
                old = current[2].get(rest[0], [])
                current[2][rest[0]] = (old if isinstance(old, list) else [old]) + [rest[1]]
        else:
            fail(f"Parse error (invalid command) at line {line}, byte 0")
    return changed(config, sections)


def changed(config, sections):
    """With what a session has set and not committed."""
    try:
        changes = open(os.path.join(options.get("-P", ""), config)).read().splitlines()
    except OSError:
        return sections
    for change in changes:
        path, value = change.split("=", 1)
        _, name, option = path.split(".")
        for section in sections:
            if section[1] == name:
                section[2][option] = value.strip("'")
    return sections


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def export(config):
    print(f"package {config}\n")
    for kind, name, options in read(config):
        print(f"config {kind}" + (f" {quoted(name)}" if name else ""))
        for option, value in options.items():
            for item in value if isinstance(value, list) else [value]:
                print(f"\t{'list' if isinstance(value, list) else 'option'} {option} {quoted(item)}")
        print()


def get(path):
    config, section, option = path.split(".")
    for _, name, options in read(config):
        if name == section and option in options:
            value = options[option]
            print(" ".join(value) if isinstance(value, list) else value)
            return
    fail("Entry not found")


options, (command, argument) = getopt.getopt(sys.argv[1:], "qNc:P:")
options = dict(options)
quiet, where = "-q" in options, options.get("-c", "/etc/config")
{"export": export, "get": get}[command](argument)
