#!/usr/bin/env python3
"""pot.py APP: prints the template for translators of LuCI's pages: every _('...') of their scripts and
every title of the menu and of the rights, with the files that they are in."""
import json
import pathlib
import re
import sys

app = pathlib.Path(sys.argv[1])
strings = {}
for script in sorted(app.glob("htdocs/**/*.js")):
    for text in re.findall(r"\b_\('((?:[^'\\]|\\.)*)'\)", script.read_text()):
        strings.setdefault(re.sub(r"\\(.)", r"\1", text), set()).add(script)
for entries in sorted(app.glob("root/usr/share/*/*.d/*.json")):
    for entry in json.loads(entries.read_text()).values():
        strings.setdefault(entry.get("title") or entry["description"], set()).add(entries)
print('msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8"')
for text in sorted(strings, key=lambda text: (text.lower(), text)):
    print()
    for file in sorted(strings[text]):
        print("#:", file.relative_to(app))
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    print(f'msgid "{quoted}"\nmsgstr ""')
