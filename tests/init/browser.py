"""Headless Chromium, by its DevTools protocol over a pipe: a page, what it says, and pictures of it."""
import base64
import fcntl
import json
import os
import select
import subprocess
import time

OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync",
           "--disable-dev-shm-usage", "--force-color-profile=srgb", "--hide-scrollbars", "--remote-debugging-pipe"]


class Failed(Exception):
    pass


class Browser:
    def __init__(self, home, host, width, height):
        """With nothing but one host in its world."""
        def above(fds):
            return [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]
        (its_in, self.out), (self.into, its_out) = above(os.pipe()), above(os.pipe())
        def fds():
            os.dup2(its_in, 3)
            os.dup2(its_out, 4)
        self.process = subprocess.Popen(
            ["chromium", *OPTIONS, f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {host}", f"--window-size={width},{height}",
             f"--user-data-dir={home}/chromium", "about:blank"],
            pass_fds=(3, 4), preexec_fn=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": home})
        for fd in (its_in, its_out):
            os.close(fd)
        self.rest, self.number, self.session = b"", 0, None
        self.complaints, self.dragged = [], None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = [target for target in targets if target["type"] == "page"][0]["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.size(width, height)

    def size(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def end(self):
        self.process.terminate()
        self.process.wait()

    def message(self, seconds):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], seconds)
            data = os.read(self.into, 1 << 20) if ready else b""
            if not data:
                raise Failed("Chromium has ended" if ready else f"Chromium said nothing for {seconds} s")
            self.rest += data
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def call(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.out, json.dumps(call).encode() + b"\0")
        while True:
            message = self.message(60)
            if message.get("id") == self.number:
                if "error" in message:
                    raise Failed(f"{method}: {message['error']['message']}")
                return message["result"]
            self.heard(message.get("method"), message.get("params"))

    def heard(self, method, params):
        """What no page should say."""
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Input.dragIntercepted":
            self.dragged = params["data"]

    def js(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in reply:
            raise Failed(reply["exceptionDetails"]["exception"].get("description", expression))
        return reply["result"].get("value")

    def until(self, expression, seconds=15):
        """Waits for an expression to be true, over pages that come and go; what it is then."""
        end = time.monotonic() + seconds
        why = ""
        while time.monotonic() < end:
            try:
                value = self.js(expression)
                if value:
                    return value
            except Failed as failed:
                why = f" ({failed})"
            time.sleep(0.05)
        raise Failed(f"not within {seconds} s: {expression}{why}")

    def picture(self, path):
        """Of the window, as far down as there is something in it."""
        self.until("document.getAnimations().every(animation => animation.playState != 'running')")
        width, height = self.js("""[innerWidth, Math.min(innerHeight, 10 + Math.max(...
            [...document.querySelectorAll('#maincontent, .modal')].map(node => node.getBoundingClientRect().bottom)))]""")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def drag(self, start, end):
        """From one place to another, as a mouse does."""
        self.call("Input.setInterceptDrags", enabled=True)
        self.dragged = None
        def mouse(kind, at):
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", buttons=1, clickCount=1)
        mouse("mousePressed", start)
        mouse("mouseMoved", (start[0], start[1] + (8 if end[1] > start[1] else -8)))
        while self.dragged is None:
            mouse("mouseMoved", end)
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=end[0], y=end[1], data=self.dragged)
        mouse("mouseReleased", end)
        self.call("Input.setInterceptDrags", enabled=False)
