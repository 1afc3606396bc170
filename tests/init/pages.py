#!/usr/bin/env python3
"""Clicks through LuCI's pages of cgtproxy, and looks into the kernel of the router for what comes of it.

    pages.py URL DIR COMMAND...

URL is the router's, DIR gets pictures of the pages, and COMMAND runs a line of shell on the router (its
last argument), where `flow NAME` says of the connection of a service how often it was made, how many
answers it got, the longest wait for one in ms and who answered last, and `got PORT` how many datagrams
have left for a port. The services are those of luci.sh. Exit status 1 if anything fails.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from browser import Browser, Failed

URL, DIR, *ROUTER = sys.argv[1:]
READY = """document.readyState == 'complete' && window.L && document.querySelector('#view') &&
    !document.querySelector('#view .spinning') && document.querySelector('#view').children.length > 0"""
MODAL = "(document.body.classList.contains('modal-overlay-active') ? document.querySelector('#modal_overlay .modal') : null)"
# those that change something, and can be clicked
BUTTONS = """[...document.querySelectorAll('#view button, .cbi-page-actions button, .cbi-page-actions .cbi-dropdown')]
    .filter(node => !node.disabled && !node.hasAttribute('disabled')).map(node => node.innerText.trim().split(/\\n/)[0])
    .filter(text => ['Add', 'Delete', 'Save', 'Save & Apply'].includes(text))"""
failed = False


def check(what, test, *arguments, **named):
    global failed
    try:
        problem = test(*arguments, **named)
    except (Failed, AssertionError) as failure:
        problem = str(failure) or "it is not so"
    print(f"FAILED {what}\n       {problem}" if problem else f"ok     {what}", flush=True)
    failed |= bool(problem)


def router(line):
    return subprocess.run([*ROUTER, line], capture_output=True, text=True).stdout.strip()


def within(test, seconds=10):
    """Waits for what nothing announces."""
    end = time.monotonic() + seconds
    while True:
        problem = test()
        if not problem or time.monotonic() > end:
            return problem
        time.sleep(0.1)


def in_router(line, *words, absent=()):
    def look():
        text = router(line)
        missing = [word for word in words if word not in text] + ["no " + word for word in absent if word in text]
        return missing and f"{', '.join(missing)}: not in what {line} says:\n{text}"
    return within(look)


# pages

def go(page):
    browser.call("Page.navigate", url=f"{URL}/cgi-bin/luci/admin/services/cgtproxy/{page}")
    browser.until(f"location.pathname.endsWith('/{page}') && {READY}")


def click(text, where=None):
    browser.js("""(() => {
        const all = [...(%s || document.querySelector('%s')).querySelectorAll('button, .btn')];
        const found = all.filter(button => button.offsetParent && button.innerText.trim() == %s).pop();
        if (!found) throw new Error('no button: ' + %s);
        found.click();
    })()""" % (MODAL, where or "#maincontent", json.dumps(text), json.dumps(text)))


def apply():
    """Save & Apply, on the page or in the header's dialog."""
    browser.js("""window.before = true;
        (%s || document.querySelector('.cbi-page-actions')).querySelector('.cbi-dropdown li[display], .cbi-dropdown li').click()"""
               % MODAL)


def reloaded():
    browser.until(f"!window.before && {READY}", 40)


def said():
    """What a dialog says."""
    return browser.until(f"{MODAL} && {MODAL}.innerText")


def says(*words):
    text = browser.js("document.querySelector('#view').innerText")
    missing = [word for word in words if word not in text]
    return missing and f"{missing} is not in\n{text}"


def dialog(*words):
    browser.until(" && ".join(f"{MODAL} && {MODAL}.innerText.includes({json.dumps(word)})" for word in words))


def select(option, value):
    browser.js("""(() => {
        const node = %s.querySelector('[data-name="%s"] select');
        node.value = %s;
        node.dispatchEvent(new Event('change', { bubbles: true }));
        if (node.value != %s) throw new Error('not offered');
    })()""" % (MODAL, option, json.dumps(value), json.dumps(value)))


def pick(option, value):
    """From the list that is offered beside a list."""
    browser.js("%s.querySelector('[data-name=\"%s\"] .cbi-dropdown').click()" % (MODAL, option))
    browser.js("%s.querySelector('[data-name=\"%s\"] .cbi-dropdown li[data-value=\"%s\"]').click()" % (MODAL, option, value))
    browser.until("[...%s.querySelectorAll('[data-name=\"%s\"] .item input')].some(node => node.value == %s)"
                  % (MODAL, option, json.dumps(value)))


def offered(option):
    return browser.js("[...%s.querySelectorAll('[data-name=\"%s\"] .cbi-dropdown li')].map(node => node.getAttribute('data-value'))"
                      % (MODAL, option))


def fill(option, value):
    browser.js("""(() => {
        const node = (%s || document.querySelector('#view')).querySelector('[data-name="%s"] input[type=text], [data-name="%s"] input:not([type])');
        node.value = %s;
        for (const event of ['input', 'keyup', 'change', 'blur'])
            node.dispatchEvent(new Event(event, { bubbles: true }));
    })()""" % (MODAL, option, option, json.dumps(value)))


def tab(title):
    browser.js("[...document.querySelectorAll('#view .cbi-tabmenu a')].find(node => node.innerText == %s).click()" % json.dumps(title))


def added(section):
    """A new section of a page, in its dialog."""
    browser.js("document.querySelector('#cbi-cgtproxy-%s .cbi-section-create .cbi-button-add').click()" % section)
    browser.until(f"{MODAL} && {MODAL}.classList.contains('cbi-modal')")


def saved():
    click("Save")
    browser.until(f"!{MODAL}")


def picture(name):
    browser.picture(f"{DIR}/{name}.png")


# what has to hold

flows = {name: router("flow " + name).split() for name in ("aria2", "transmission")}


def flows_go_on():
    problems = []
    for name, (connections, answers, _, way) in flows.items():
        now = router("flow " + name).split()
        if now[0] != connections or now[3] != way or int(now[1]) <= int(answers) or int(now[2]) > 1000:
            problems.append(f"{name}: {flows[name]} before, {now} now")
        flows[name] = now
    return problems


def leaves():
    before = int(router("got 9"))
    return within(lambda: "nothing leaves" if int(router("got 9")) == before else None)


def leaves_not():
    def look():
        before = int(router("got 9"))
        time.sleep(0.3)
        after = int(router("got 9"))
        return f"{after - before} datagrams leave" if after > before else None
    return within(look)


def overview():
    check("the overview: what is in force, and that the proxy listens", says, "In force", "direct", "listens: tcp udp")
    check("that nothing listens where nothing does", says, "nothing listens")
    check("in words, with the remedy", says, "Whether the proxy listens", "start the proxy")
    check("what each application does", says, "/services/aria2/instance1", "service:aria2", "/services/telemetry/instance1")
    check("that ip rules and routes are present", says, "ip rules and routes are present")
    graphs = "[...document.querySelectorAll('#cgtproxy-targets tr')].map(row => [row.innerText.split(/\\s/)[0], " \
             "row.querySelector('polyline') && row.querySelector('polyline').getAttribute('points')])"
    drawn = f"{graphs}.some(graph => graph[0] == 'mihomo' && graph[1].split(' ').length > 8 && " \
            "new Set(graph[1].split(' ').map(point => point.split(',')[1])).size > 1)"
    check("a graph of what goes to the proxy", lambda: browser.until(drawn, 60) is not True)
    browser.size(1000, 1060)
    picture("overview")
    browser.size(1000, 760)


def rules():
    go("rules")
    check("who may change them has the buttons", lambda: {"Add", "Delete", "Save", "Save & Apply"} - set(browser.js(BUTTONS)))
    check("nothing is dropped yet", leaves)
    added("rule")
    lists = offered("service")
    check("services that talk are offered", lambda: None if {"telemetry", "transmission"} <= set(lists) else lists)
    lists = offered("match")
    check("so are their cgroups", lambda: None if "/services/telemetry/instance1" in lists else lists)
    lists = offered("user")
    check("and users", lambda: None if "nobody" in lists else lists)
    select("target", "drop")
    pick("service", "telemetry")
    picture("rule")
    saved()
    picture("rules")
    apply()
    reloaded()
    check("a rule, applied: it is in the kernel", in_router, "nft list set inet cgtproxy cg_drop", "telemetry")
    check("and nothing leaves any more", leaves_not)
    check("no flow was cut", flows_go_on)

    go("rules")
    added("rule")
    select("target", "direct")
    pick("service", "telemetry")
    saved()
    rows = "[...document.querySelectorAll('#cbi-cgtproxy-rule tr[data-sid]')]"
    handle = "(row => { const at = row.querySelector('.drag-handle').getBoundingClientRect(); return [at.x + at.width / 2, at.y + at.height / 2] })"
    last, first = browser.js(f"{handle}({rows}.pop())"), browser.js(f"{handle}({rows}[0])")
    browser.drag(last, (first[0], first[1] - 8))
    check("a rule is dragged to the top", lambda: browser.until(f"{rows}[0].innerText.includes('telemetry')") is not True)
    apply()
    reloaded()
    check("where it decides: what was dropped leaves", leaves)
    check("no flow was cut by that", flows_go_on)
    go("rules")
    browser.js(f"{rows}[0].querySelector('.cbi-button-remove').click()")
    browser.until(f"!{rows}[0].innerText.includes('telemetry')")
    apply()
    reloaded()
    check("removed, and nothing leaves", leaves_not)


UCI = "${dir:-/etc}/config/cgtproxy"


def late(how):
    """The service hears of what is applied later than usual, where the router is a stand-in."""
    router(f'[ -z "$dir" ] || {how} $dir/late')


def refusals():
    text = '"route-table" expects'
    before = router("nft list table inet cgtproxy | grep -v counter")
    go("settings")
    tab("Advanced")
    fill("route_table", "abc")
    apply()
    check("what check refuses is not applied, and said in its words", dialog, "This configuration is refused", text)
    picture("refused")
    check("it is not saved", in_router, "uci export cgtproxy", "rule", absent=["abc"])
    click("Dismiss")
    browser.js("document.querySelector('[data-indicator=uci-changes]').click()")
    browser.until(f"{MODAL} && {MODAL}.classList.contains('uci-dialog')")
    late("touch")
    apply()
    reloaded()
    check("refused behind the header's own dialog: said as well", dialog, "The last configuration was refused", text)
    late("rm")
    picture("refused-later")
    check("the table is the same", lambda: router("nft list table inet cgtproxy | grep -v counter") != before)
    check("and nothing leaves", leaves_not)
    check("no flow was cut by what was refused", flows_go_on)
    go("overview")
    check("the overview says it, too", dialog, "The last configuration was refused", text)
    go("settings")
    dialog("refused")
    click("Dismiss")
    browser.until(f"!{MODAL}")
    tab("Advanced")
    fill("route_table", "")
    apply()
    reloaded()
    check("put right, it is not said any more", lambda: browser.js(f"{MODAL} && {MODAL}.innerText"))
    check("no flow was cut by that either", flows_go_on)

    # of a rule there are as many lines as it has services
    router(f"""cp {UCI} /tmp/before; printf "config rule\\n\\toption target 'nosuch'\\n\\tlist service 'a'\\n\\tlist service 'b'\\n" >>{UCI}""")
    go("settings")
    tab("Advanced")
    fill("route_table", "301")
    apply()
    check("what is wrong with a rule of several lines is said", dialog, "This configuration is refused", 'undefined target "nosuch"')
    check("once", lambda: [line for line in said().split("\n") if "nosuch" in line][1:])
    router(f"cp /tmp/before {UCI}")
    click("Dismiss")
    browser.js("document.querySelector('[data-indicator=uci-changes]').click()")
    browser.until(f"{MODAL} && {MODAL}.classList.contains('uci-dialog')")
    click("Revert")
    reloaded()


def targets():
    go("targets")
    browser.js("document.querySelector('#cbi-cgtproxy-route .cbi-section-create-name').value = 'vpn'")
    browser.js("document.querySelector('#cbi-cgtproxy-route .cbi-section-create-name').dispatchEvent(new Event('keyup', {bubbles: true}))")
    added("route")
    fill("interface", "wg0")
    saved()
    picture("targets")
    apply()
    reloaded()
    check("a route, applied: it is a target in the kernel", in_router, "nft list table inet cgtproxy", "wg0")
    go("overview")
    check("whose state the overview shows", says, "vpn", "wg0")


def gateways():
    go("gateways")
    added("gateway")
    select("target", "drop")
    lists = offered("network")
    check("networks are offered", lambda: None if "lan" in lists and "loopback" not in lists else lists)
    check("hosts are offered by name and address", lambda: browser.until(
        f"{MODAL}.querySelector('[data-name=source_mac]').innerText.includes('tv, 192.168.1.5 (02:00:00:00:00:11)') || "
        f"{MODAL}.querySelector('[data-name=source_mac]').textContent.includes('tv, 192.168.1.5 (02:00:00:00:00:11)')") is not True)
    pick("network", "lan")
    pick("source_mac", "02:00:00:00:00:11")
    picture("gateway")
    saved()
    check("and shown by name", says, "tv", "lan")
    picture("gateways")
    apply()
    reloaded()
    check("a gateway, applied: it is in the kernel", in_router, "nft list table inet cgtproxy", "br-lan", "02:00:00:00:00:11")
    check("no flow was cut by a gateway", flows_go_on)


def settings():
    go("settings")
    browser.js("""(() => { const node = document.querySelector('#view [data-name=containers] select');
        node.value = 'no'; node.dispatchEvent(new Event('change', { bubbles: true })); })()""")
    fill("hold", "/services/held")
    picture("settings")
    apply()
    reloaded()
    check("a setting, applied", in_router, "uci export cgtproxy", "option containers 'no'", "list hold '/services/held'")
    check("in the kernel as well", in_router, "mkdir -p /sys/fs/cgroup/services/held; nft list table inet cgtproxy", "held")
    check("what was not touched is as before", in_router, "uci export cgtproxy", "option enabled '1'")
    check("no flow was cut by a setting", flows_go_on)


def rights():
    """Of the session, by what the page can ask."""
    browser.js("""window.asked = (object, method, args) => fetch(L.env.ubuspath, { method: 'POST', body: JSON.stringify({ jsonrpc: '2.0',
        id: 1, method: 'call', params: [ L.env.sessionid, object, method, args ] }) }).then(reply => reply.json())""")
    for name, method, arguments in [("uci", "get", {"config": "rpcd"}), ("uci", "set", {"config": "network", "section": "lan", "values": {"proto": "none"}}),
                                    ("cgtproxy", "explain", {"pid": 1}), ("luci-rpc", "getDHCPLeases", {})]:
        asked = f"asked({json.dumps(name)}, {json.dumps(method)}, {json.dumps(arguments)})"
        check(f"no right to {name}.{method} of {arguments}", lambda: browser.js(f"{asked}.then(reply => reply.error ? reply.error.code : reply.result[0])") not in (-32002, 6))


def viewer():
    """A user who may see, and not change; where the router has one."""
    if not login("viewer"):
        return print("SKIP   who may not change: no such user")
    browser.js("sessionStorage.clear()")
    go("rules")
    check("who may see sees", says, "service:aria2")
    check("and has nothing to change it with", lambda: browser.js(BUTTONS))
    go("overview")
    check("the overview as well", says, "In force", "/services/aria2/instance1")


class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def login(user):
    form = urllib.request.Request(URL + "/cgi-bin/luci/", f"luci_username={user}&luci_password=".encode())
    try:
        headers = urllib.request.build_opener(Stay).open(form).headers
    except urllib.error.HTTPError as reply:
        headers = reply.headers
    name, _, value = (headers["Set-Cookie"] or "").partition(";")[0].partition("=")
    return value and browser.call("Network.setCookie", name=name, value=value, url=URL)


os.makedirs(DIR, exist_ok=True)
# Chromium's helpers outlive it by a moment, and may still write; /tmp ends with the container.
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
    browser = Browser(home, urllib.parse.urlsplit(URL).hostname, 1000, 760)
    try:
        assert login("root")
        go("overview")
        for part in (overview, rules, refusals, targets, gateways, settings, rights, viewer):
            try:
                part()
            except Failed as failure:
                check(part.__name__, lambda: failure)
                picture("failed-" + part.__name__)
        check("no page complained", lambda: set(browser.complaints))
    finally:
        browser.end()
sys.exit(failed)
