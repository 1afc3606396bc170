#!/usr/bin/env python3
"""A stand-in for procd, ubus, jsonfilter and logd of OpenWrt, for procd.sh.

    procd.py serve DIR PID       procd and logd, until PID ends; DIR/log has what logread shows
    procd.py ask DIR METHOD ...  what rc.common asks of procd
    procd.py ubus DIR call service METHOD MESSAGE
    procd.py jsonfilter -s JSON -e EXPRESSION

It does what procd was seen doing that a service script can trip over: an instance that `set` does not
name is stopped; what runs is signalled or restarted where a parameter or a file has changed, and left
alone else; what has ended is started after the pause that respawn names; each service's instance has
its cgroup, which stays; triggers are replaced as a whole, and stay where no instance is; capabilities and no_new_privs do nothing
without a jail. With DIR/old there, a service whose cgroup is there already lands in the root cgroup.
"""
import hashlib
import json
import os
import re
import select
import shlex
import signal
import socket
import sys
import time

CGROUPS = "/sys/fs/cgroup"
LEVELS = "emerg alert crit err warn notice info debug".split()
# bytes of a message that logd takes for a timestamp where the last is a blank
PADDING = 16


class Instance:
    def __init__(self, service, name, params):
        self.service, self.name, self.params = service, name, params
        self.pid = None
        self.halt = self.again = False
        self.due = None
        self.sums = self.checksums()

    def checksums(self):
        def of(file):
            try:
                return hashlib.md5(open(file, "rb").read()).hexdigest()
            except OSError:
                return None
        return {file: of(file) for file in self.params.get("file", [])}


class Procd:
    def __init__(self, where, test):
        self.where, self.test = where, test
        self.services = {}
        self.triggers = {}
        self.deleted = set()
        self.log = open(where + "/log", "a", buffering=1)
        self.pipes = {}

    # logd

    def logged(self, datagram):
        text = datagram.decode(errors="replace").rstrip("\n\0")
        found = re.match(r"<(\d+)>", text)
        level = int(found.group(1)) if found else 13
        text = text[found.end():] if found else text
        if len(text) >= PADDING and text[PADDING - 1] == " ":
            text = text[PADDING:]
        facility = {3: "daemon", 1: "user"}.get(level >> 3, str(level >> 3))
        self.log.write(f"{facility}.{LEVELS[level & 7]} {text}\n")

    # instances

    def start(self, instance):
        if instance.pid:
            instance.again |= instance.halt
            return
        instance.halt = instance.again = False
        instance.due = None
        params = instance.params
        for name in ("capabilities", "no_new_privs"):
            if name in params and "jail" not in params:
                self.log.write(f"daemon.err procd: {instance.service}: {name} does nothing without a jail\n")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.become(instance, write)
        os.close(write)
        self.pipes[read] = (instance, pid, b"")
        instance.pid = pid

    def become(self, instance, write):
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            service = f"{CGROUPS}/services/{instance.service}"
            group = f"{service}/{instance.name}"
            if os.path.exists(CGROUPS + "/cgroup.procs"):
                if os.path.exists(self.where + "/old") and os.path.exists(service):
                    group = CGROUPS
                os.makedirs(group, mode=0o700, exist_ok=True)
                with open(group + "/cgroup.procs", "w") as file:
                    file.write(str(os.getpid()))
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(write if "stderr" in instance.params else null, 2)
            os.closerange(3, 256)
            os.execvp(instance.params["command"][0], instance.params["command"])
        finally:
            os._exit(127)

    def stop(self, instance):
        if instance.pid:
            instance.halt, instance.again = True, False
            os.kill(instance.pid, signal.SIGTERM)
        else:
            self.forget(instance)

    def forget(self, instance):
        service = self.services.get(instance.service, {})
        if service.get(instance.name) is instance:
            del service[instance.name]
        if not service and instance.service in self.deleted:
            self.forget_service(instance.service)

    def forget_service(self, name):
        self.services.pop(name, None)
        self.triggers.pop(name, None)
        self.deleted.discard(name)

    def ended(self, pid):
        for service in list(self.services.values()):
            for instance in list(service.values()):
                if instance.pid != pid:
                    continue
                instance.pid = None
                if instance.halt and not instance.again:
                    self.forget(instance)
                elif instance.again:
                    self.start(instance)
                elif "respawn" in instance.params:
                    _threshold, pause, _retry = map(int, instance.params["respawn"])
                    instance.due = time.monotonic() + pause
                return

    # what is asked

    def set(self, name, instances, triggers):
        service = self.services.setdefault(name, {})
        self.deleted.discard(name)
        for old in [i for i in service.values() if i.name not in instances]:
            self.stop(old)
        self.triggers[name] = triggers
        for key, params in instances.items():
            new = Instance(name, key, params)
            old = service.get(key)
            if old is None:
                service[key] = new
                self.start(new)
                continue
            changed = old.params != new.params or old.sums != new.sums
            was_running = old.pid and not old.halt
            old.params, old.sums = new.params, new.sums
            if not was_running:
                self.start(old)
            elif changed and "reload_signal" in params:
                os.kill(old.pid, int(params["reload_signal"][0]))
            elif changed:
                old.halt = old.again = True
                os.kill(old.pid, signal.SIGTERM)
        return {}

    def ask(self, method, message):
        name = message.get("name")
        service = self.services.get(name)
        if method == "set":
            return self.set(name, message["instances"], message["triggers"])
        if method == "list":
            names = [name] if name else list(self.services)
            return {n: self.describe(n) for n in names if n in self.services}
        if service is None:
            return None
        if method == "delete":
            self.deleted.add(name)
            for instance in list(service.values()):
                self.stop(instance)
            if not service:
                self.forget_service(name)
            return {}
        if method == "signal":
            for instance in service.values():
                if instance.pid is None:
                    return None
                os.kill(instance.pid, int(message.get("signal", signal.SIGHUP)))
            return {}
        raise ValueError(method)

    def describe(self, name):
        def of(instance):
            text = {"running": instance.pid is not None, "command": instance.params["command"]}
            if instance.pid:
                text["pid"] = instance.pid
            return text
        instances = {i.name: of(i) for i in self.services[name].values()}
        return {"instances": instances, "triggers": self.triggers.get(name, [])}

    def serve(self):
        with open("/proc/self/comm", "w") as name:
            name.write("procd")
        log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        log.bind("/dev/log")
        asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        asked.bind(self.where + "/ubus")
        asked.listen(16)
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for fd in (log, asked):
            os.set_inheritable(fd.fileno(), False)
        while True:
            waits = [i.due for s in self.services.values() for i in s.values() if i.due]
            left = max(0, min(waits) - time.monotonic()) if waits else None
            ready, _, _ = select.select([log, asked, read, *self.pipes], [], [], left)
            if log in ready:
                self.logged(log.recv(8192))
            if read in ready:
                os.read(read, 4096)
            for fd in [fd for fd in self.pipes if fd in ready]:
                self.heard(fd)
            while self.reap():
                pass
            if asked in ready:
                self.answer(asked.accept()[0])
            now = time.monotonic()
            for service in list(self.services.values()):
                for instance in list(service.values()):
                    if instance.due and instance.due <= now:
                        self.start(instance)

    def reap(self):
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == self.test:
            os._exit(os.waitstatus_to_exitcode(status))
        if pid:
            self.ended(pid)
        return pid != 0

    def heard(self, fd):
        instance, pid, rest = self.pipes[fd]
        data = os.read(fd, 4096)
        *lines, rest = (rest + data).split(b"\n")
        self.pipes[fd] = (instance, pid, rest)
        name = os.path.basename(instance.params["command"][0])
        for line in lines:
            self.log.write(f"daemon.err {name}[{pid}]: {line.decode(errors='replace')}\n")
        if not data:
            os.close(fd)
            del self.pipes[fd]

    def answer(self, client):
        with client:
            text = b""
            while data := client.recv(65536):
                text += data
            client.sendall(json.dumps(self.ask(*json.loads(text))).encode())


def ask(where, method, message):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(where + "/ubus")
    client.sendall(json.dumps([method, message]).encode())
    client.shutdown(socket.SHUT_WR)
    text = b""
    while data := client.recv(65536):
        text += data
    return json.loads(text)


def service(lines):
    """Lines of words, quoted for the shell: `instance NAME`, `param TYPE VALUE...`, `trigger PACKAGE`."""
    instances, triggers, current = {}, [], None
    for line in lines:
        kind, *words = shlex.split(line)
        if kind == "instance":
            current = instances.setdefault(words[0], {})
        elif kind == "trigger":
            triggers += words
        else:
            current[words[0]] = words[1:]
    return instances, triggers


def jsonfilter(text, expression):
    found = [json.loads(text)]
    for part in re.findall(r"\.([a-z0-9_]+)|(\[\*\])", expression):
        name, every = part
        found = [v for f in found for v in
                 ((f if isinstance(f, list) else list(f.values())) if every else [f[name]] if name in f else [])]
    for value in found:
        print(value if isinstance(value, (str, int)) else json.dumps(value))
    return 0 if found else 1


def main(what, *args):
    if what == "serve":
        return Procd(args[0], int(args[1])).serve()
    if what == "jsonfilter":
        return jsonfilter(args[1], args[3])
    where, *args = args
    if what == "ask":
        method, name, *rest = args
        message = {"name": name}
        if method == "set":
            message["instances"], message["triggers"] = service(sys.stdin)
        elif rest:
            message["signal"] = int(rest[0])
    else:
        if args[0] == "-t":
            args = args[2:]
        if args[0] == "-S":
            args = args[1:]
        _call, service_, method, *text = args
        if service_ != "service":
            return 4
        message = json.loads(text[0]) if text else {}
    reply = ask(where, method, message)
    if reply is None:
        print(f"Command failed: ubus call service {method} (Not found)", file=sys.stderr)
        return 4
    if what == "ubus":
        print(json.dumps(reply))
    return 0


sys.exit(main(*sys.argv[1:]))
