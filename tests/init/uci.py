#!/usr/bin/env python3
"""A stand-in for uci of OpenWrt, as far as cgtproxy-uci and LuCI's pages ask it.

    uci.py [-q] [-N] [-c DIR] [-P CHANGES] export CONFIG
    uci.py [-q] [-N] [-c DIR] get CONFIG.SECTION.OPTION

It reads and prints what the real one was seen reading and printing: words and quotes as a shell has
them, values of several lines, the place of a mistake, and `Entry not found`, with exit status 1. What
a session has set and not committed is read from files as the real one writes them. Also a module
(luci.py).
"""
import getopt
import os
import sys
import zlib


class Mistake(Exception):
    pass


class Section:
    def __init__(self, kind, name):
        self.kind, self.name, self.anonymous = kind, name, not name
        self.options = {}


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
        raise Mistake(f"Parse error (EOF with unterminated {quote}) at line {len(last)}, byte {len(last[-1])}")
    if word is not None:
        found.append(word)
    if found:
        yield line, found


def parse(text):
    """Sections, those without a name with the one that they are spoken of by."""
    sections = []
    for line, (kind, *rest) in words(text):
        if kind == "package":
            continue
        if kind == "config" and 1 <= len(rest) <= 2:
            kind, name = rest[0], rest[1] if len(rest) > 1 else ""
            same = [s for s in sections if name and s.name == name]
            if not same:
                sections.append(Section(kind, name))
            current = (same or sections)[-1]
        elif kind in ("option", "list") and len(rest) == 2:
            if not sections:
                raise Mistake(f"Parse error ({kind} command found before the first section) at line {line}, byte 0")
            if not rest[0].replace("_", "").isalnum():
                raise Mistake(f"Parse error (invalid character in name field) at line {line}, byte 0")
            add(current.options, kind, *rest)
        else:
            raise Mistake(f"Parse error (invalid command) at line {line}, byte 0")
    for n, section in enumerate(sections):
        if section.anonymous:
            section.name = "cfg%02x%04x" % (n + 1, zlib.crc32(repr((section.kind, section.options)).encode()) & 0xffff)
    return sections


def add(options, kind, name, value):
    if kind == "option":
        options[name] = value
    else:
        old = options.get(name, [])
        options[name] = (old if isinstance(old, list) else [old]) + [value]


def changes(text):
    """What a session has changed: (command, section, option or None, value) each."""
    for _, (word,) in words(text):
        command = word[0] if word[0] in "-+|^" else ""
        path, _, value = word[len(command):].partition("=")
        _, section, *option = path.split(".")
        yield command, section, option[0] if option else None, value


def changed(sections, text):
    for command, name, option, value in changes(text):
        found = [s for s in sections if s.name == name]
        if command == "-" and found:
            if option is None:
                sections.remove(found[0])
            else:
                found[0].options.pop(option, None)
        elif command == "^" and found:
            sections.remove(found[0])
            sections.insert(int(value), found[0])
        elif option is None and command in ("", "+") and not found:
            sections.append(Section(value, name))
            sections[-1].anonymous = command == "+"
        elif option is not None and command in ("", "|") and found:
            add(found[0].options, "list" if command else "option", option, value)
    return sections


def read(where, config, staged=None):
    try:
        with open(os.path.join(where, config)) as file:
            sections = parse(file.read())
    except OSError:
        raise Mistake("Entry not found") from None
    try:
        with open(os.path.join(staged or "", config)) as file:
            return changed(sections, file.read())
    except OSError:
        return sections


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def exported(sections):
    text = ""
    for section in sections:
        text += f"config {section.kind}" + ("" if section.anonymous else f" {quoted(section.name)}") + "\n"
        for option, value in section.options.items():
            for item in value if isinstance(value, list) else [value]:
                text += f"\t{'list' if isinstance(value, list) else 'option'} {option} {quoted(item)}\n"
        text += "\n"
    return text


def main():
    options, (command, argument) = getopt.getopt(sys.argv[1:], "qNc:P:")
    options = dict(options)
    where, staged = options.get("-c", "/etc/config"), options.get("-P")
    try:
        if command == "export":
            print(f"package {argument}\n\n" + exported(read(where, argument, staged)), end="")
            return 0
        config, section, option = argument.split(".")
        for found in read(where, config, staged):
            if found.name == section and option in found.options:
                value = found.options[option]
                print(" ".join(value) if isinstance(value, list) else value)
                return 0
        raise Mistake("Entry not found")
    except Mistake as mistake:
        if "-q" not in options:
            print(f"uci: {mistake}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
