#!/usr/bin/env python3
"""A stand-in for uhttpd, rpcd and what LuCI does on a router, under which LuCI's own runtime shows the
pages of cgtproxy (see luci.sh).

    luci.py ROUTER REPOSITORY LUCI PORT

ROUTER is the directory of router.sh, LUCI a checkout of LuCI, whose scripts and styles are served as
they are. A call is answered as rpcd does: refused unless an ACL of LuCI's base or of cgtproxy allows it,
the object's method (-32002) and the configuration that it names (status 6). What a session sets is staged in
the files that uci reads, committed by apply, which lets procd reload, and is taken back unless the
page confirms it. What nobody should ask for is a line of ROUTER/unknown.
"""
import http.server
import json
import mimetypes
import os
import subprocess
import sys
import threading
import time
import urllib.parse

import uci

ROUTER, REPOSITORY, LUCI, PORT = sys.argv[1:]
APP = REPOSITORY + "/init/openwrt/luci-app-cgtproxy"
ROOTS = [APP + "/htdocs", LUCI + "/modules/luci-base/htdocs", LUCI + "/themes/luci-theme-bootstrap/htdocs"]
SESSION = "0123456789abcdef0123456789abcdef"
# of a user who may see, and not change
VIEWER = "fedcba9876543210fedcba9876543210"
STAGED = f"{ROUTER}/run/rpcd/uci-{SESSION}"
CONFIG = ROUTER + "/config"
# seconds: procd waits for further changes before it reloads, and uci for a page that confirms
SETTLE, CONFIRM = 0.5, 30
HOSTS = {
    "02:00:00:00:00:11": {"name": "tv", "ipaddrs": ["192.168.1.5"], "ip6addrs": []},
    "02:00:00:00:00:12": {"ipaddrs": ["192.168.1.6"], "ip6addrs": []},
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>router</title>
<link rel="stylesheet" href="/luci-static/bootstrap/cascade.css">
<script src="/cgi-bin/luci/admin/translations/en"></script>
<script src="/luci-static/resources/cbi.js"></script>
<script src="/luci-static/resources/luci.js"></script></head>
<body data-page="%s"><script>L = new LuCI(%s);</script>
<header><a class="brand" href="/">router</a><ul class="nav" id="topmenu"></ul><div id="indicators" class="pull-right"></div></header>
<div id="maincontent" class="container"><div id="tabmenu"></div>
<div id="view"><div class="spinning"></div></div></div><ul id="modemenu" style="display:none"></ul>
<script>L.require("ui").then(ui => ui.instantiateView("%s")); L.require("menu-bootstrap");</script>
</body></html>"""


def load(*paths):
    merged = {}
    for path in paths:
        with open(path) as file:
            merged.update(json.load(file))
    return merged


class Acl:
    """Of a session that may see cgtproxy or change it, and has nothing of LuCI but its base."""

    def __init__(self, *modes):
        self.modes = modes
        of = "/root/usr/share/rpcd/acl.d/"
        groups = load(LUCI + "/modules/luci-base" + of + "luci-base.json", APP + of + "luci-app-cgtproxy.json")
        self.groups = [groups["luci-base"], groups["luci-app-cgtproxy"]]

    def lists(self, scope, modes):
        return [group[mode][scope] for group in self.groups for mode in modes if scope in group.get(mode, {})]

    def call(self, name, method):
        return any(method in listed.get(name, []) for listed in self.lists("ubus", self.modes))

    def config(self, name, write):
        mode = "write" if write else "read"
        return mode in self.modes and any(name in listed for listed in self.lists("uci", [mode]))


rights = {SESSION: Acl("read", "write"), VIEWER: Acl("read")}


class Code(Exception):
    """A status of ubus: 3 no method, 4 not found, 5 no data, 6 permission denied."""


def text_of(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def stage(config, lines):
    os.makedirs(STAGED, exist_ok=True)
    with open(f"{STAGED}/{config}", "a") as file:
        file.writelines(line + "\n" for line in lines)


def staged():
    return os.listdir(STAGED) if os.path.isdir(STAGED) else []


class Uci:
    """The object uci of rpcd."""

    def get(self, config):
        values = {}
        for index, section in enumerate(uci.read(CONFIG, config, STAGED)):
            values[section.name] = {".anonymous": section.anonymous, ".type": section.kind, ".name": section.name,
                                    ".index": index, **section.options}
        return {"values": values}

    def add(self, config, type, name=None, values=None):
        self.added = getattr(self, "added", 0) + 1
        section = name or "cfg%02xadd0" % (0x80 + self.added)
        stage(config, [f"{'' if name else '+'}{config}.{section}={uci.quoted(type)}"])
        self.set(config, section, values or {})
        return {"section": section}

    def set(self, config, section, values):
        for option, value in values.items():
            path = f"{config}.{section}.{option}"
            if isinstance(value, list):
                stage(config, ["-" + path] + [f"|{path}={uci.quoted(item)}" for item in value])
            else:
                stage(config, [f"{path}={uci.quoted(value)}"])

    def delete(self, config, section, options=None):
        paths = [f"{config}.{section}.{option}" for option in options or []]
        stage(config, ["-" + path for path in paths or [f"{config}.{section}"]])

    def order(self, config, sections):
        stage(config, [f"^{config}.{section}='{index}'" for index, section in enumerate(sections)])

    def changes(self):
        names = {"-": "remove", "+": "add", "|": "list-add", "^": "order", "": "set"}
        def told(change):
            return [names[change[0]]] + [word for word in change[1:] if word]
        return {"changes": {config: [told(c) for c in uci.changes(text_of(f"{STAGED}/{config}"))] for config in staged()}}


class Rollback:
    """What apply, confirm and revert of LuCI do."""

    old, timer = {}, None

    def apply(self, checked):
        if not staged():
            return False
        self.old = {config: text_of(f"{CONFIG}/{config}") for config in staged()}
        self.write({config: uci.exported(uci.read(CONFIG, config, STAGED)) for config in staged()})
        if checked:
            self.timer = threading.Timer(CONFIRM, self.write, [self.old])
            self.timer.start()
        self.revert()
        return True

    def write(self, configs):
        self.timer = None
        for config, text in configs.items():
            with open(f"{CONFIG}/{config}", "w") as file:
                file.write(text)
            threading.Thread(target=reload, args=[config]).start()

    def confirm(self):
        if self.timer is None:
            return False
        self.timer.cancel()
        self.timer = None
        return True

    def revert(self):
        for config in staged():
            os.remove(f"{STAGED}/{config}")


def reload(config):
    """What procd's trigger runs; nobody hears how it ends. A busy router takes its time."""
    time.sleep(5 if os.path.exists(ROUTER + "/late") else SETTLE)
    subprocess.run(["busybox", "ash", ROUTER + "/rc.common", f"{ROUTER}/init.d/{config}", "reload"],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def of_plugin(method, message):
    """rpcd's way with a program."""
    call = subprocess.run(["busybox", "ash", ROUTER + "/rpcd", "call", method], capture_output=True,
                          input=json.dumps(message).encode() + b"\n")
    try:
        return json.loads(call.stdout if call.returncode == 0 else b"")
    except ValueError:
        raise Code(5) from None


def networks():
    sections = uci.read(CONFIG, "network") if os.path.exists(CONFIG + "/network") else []
    return {"interface": [{"interface": section.name, "up": True} for section in sections if section.kind == "interface"]}


uci_object, rollback = Uci(), Rollback()
WRITES = ("add", "set", "delete", "order", "rename")


def call(session, name, method, arguments):
    """What a call returns, or None where it is refused."""
    arguments = {key: value for key, value in arguments.items() if value is not None}
    acl = rights.get(session)
    if (name, method) == ("session", "access"):
        return {"access": acl is not None}
    if not (acl and acl.call(name, method) or (name, method) == ("luci", "getFeatures")):
        return None
    if name == "uci":
        if "config" in arguments and not acl.config(arguments["config"], method in WRITES):
            raise Code(6)
        return getattr(uci_object, method)(**arguments) or {}
    if name == "cgtproxy":
        return of_plugin(method, {**arguments, "ubus_rpc_session": session})
    if (name, method) == ("luci", "getFeatures"):
        return {}
    if (name, method) == ("luci-rpc", "getHostHints"):
        return HOSTS
    if (name, method) == ("network.interface", "dump"):
        return networks()
    if (name, method) == ("file", "list"):
        raise Code(4)
    raise Code(3)


def answer(request):
    reply = {"jsonrpc": "2.0", "id": request.get("id")}
    if request["method"] == "list":
        return {**reply, "result": {}}
    try:
        result = call(*request["params"])
        if result is None:
            unknown("refused " + ".".join(request["params"][1:3]))
            return {**reply, "error": {"code": -32002, "message": "Access denied"}}
        return {**reply, "result": [0, result]}
    except uci.Mistake:
        return {**reply, "result": [4]}
    except Code as code:
        if code.args[0] in (3, 6):
            unknown({3: "call ", 6: "refused "}[code.args[0]] + ".".join(request["params"][1:3]))
        return {**reply, "result": [code.args[0]]}


def unknown(what):
    with open(ROUTER + "/unknown", "a") as file:
        file.write(what + "\n")


def menu():
    tree = {}
    for path, node in load(APP + "/root/usr/share/luci/menu.d/luci-app-cgtproxy.json").items():
        at = tree
        for part in path.split("/"):
            at = at.setdefault("children", {}).setdefault(part, {})
            at["satisfied"] = True
        at.update(node)
    tree["children"]["admin"].update(title="Administration")
    tree["children"]["admin"]["children"]["services"].update(title="Services", action={"type": "firstchild"})
    return tree


def page(path, session):
    """The page of an entry of the menu, or None."""
    node = menu()
    for part in path:
        node = node.get("children", {}).get(part, {})
    if node.get("action", {}).get("type") != "view":
        return None
    node["readonly"] = "write" not in rights[session].modes
    environment = {
        "media": "/luci-static/bootstrap", "resource": "/luci-static/resources", "scriptname": "/cgi-bin/luci",
        "pathinfo": "/" + "/".join(path), "documentroot": "/www", "requestpath": path, "dispatchpath": path,
        "pollinterval": 1, "ubuspath": "/ubus/", "sessionid": session, "token": "token", "nodespec": node,
        "apply_rollback": CONFIRM, "apply_holdoff": 1, "apply_timeout": 5, "apply_display": 0.5,
    }
    return PAGE % ("-".join(path), json.dumps(environment).replace("/", "\\/"), node["action"]["path"])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, body=b"", kind="application/json", **headers):
        if not isinstance(body, bytes):
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def missing(self):
        unknown(f"{self.command} {self.path}")
        self.say(404)

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if path.startswith("/luci-static/") and ".." not in path:
            for root in ROOTS:
                if os.path.isfile(root + path):
                    with open(root + path, "rb") as file:
                        return self.say(200, file.read(), mimetypes.guess_type(path)[0] or "text/plain")
            return self.missing()
        if path == "/favicon.ico":
            return self.say(404)
        if path == "/cgi-bin/luci/admin/translations/en":
            return self.say(200, "", "application/javascript")
        session = self.headers.get("Cookie", "").removeprefix("sysauth_http=")
        if session not in rights:
            return self.say(403, X_LuCI_Login_Required="yes")
        if path == "/cgi-bin/luci/admin/menu":
            return self.say(200, menu())
        html = page(path.removeprefix("/cgi-bin/luci/").split("/"), session)
        return self.say(200, html, "text/html") if html else self.missing()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        action = path.removeprefix("/cgi-bin/luci/admin/uci/")
        if path.startswith("/ubus/"):
            asked = json.loads(body)
            many = isinstance(asked, list)
            answers = [answer(request) for request in (asked if many else [asked])]
            return self.say(200, answers if many else answers[0])
        if path == "/cgi-bin/luci/":
            session = VIEWER if b"luci_username=viewer" in body else SESSION
            return self.say(302, Location=path, Set_Cookie=f"sysauth_http={session}; path=/")
        # who the browser is to the router: cgi-io's, and not for this session
        if path == "/cgi-bin/cgi-exec":
            return self.say(403)
        if action == "apply_rollback":
            return self.say(200, {"token": "token"}) if rollback.apply(True) else self.say(204)
        if action == "apply_unchecked":
            rollback.apply(False)
            return self.say(204)
        if action == "confirm":
            return self.say(204) if rollback.confirm() else self.say(403)
        if action == "revert":
            rollback.revert()
            return self.say(200, {})
        return self.missing()


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *request):
        """A page that is left does not wait for what it has asked."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)


Server(("127.0.0.1", int(PORT)), Handler).serve_forever()
