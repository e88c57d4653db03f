"""A headless Chromium by its debugging protocol: what a test of a page needs, over one websocket."""
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0
""".split()
NAMES = "chromium", "chromium-browser", "google-chrome"

class Browser:
    "Open, ask, wait, look; skips the test where there is no Chromium."
    def __init__(self, size=(1100, 1400), patience=300):
        websocket = pytest.importorskip("websocket", reason="websocket-client is not installed (pip install '.[dev]')")
        exe = next(filter(None, map(shutil.which, NAMES)), None)
        if exe is None:
            pytest.skip("no Chromium on this machine")
        self.patience = patience
        self.n = 0
        self.events = []
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        window = f"--window-size={size[0]},{size[1]}"
        args = [exe, *FLAGS, f"--user-data-dir={self.folder.name}", window, "about:blank"]
        self.process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            tabs = self._wait(self._tabs)
            address = tabs[0]["webSocketDebuggerUrl"]
            self.ws = websocket.create_connection(address, timeout=patience, suppress_origin=True)
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.process.kill()
            raise
    def __enter__(self): return self

    def __exit__(self, *_):
        self.ws.close()
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def _tabs(self):
        port = (Path(self.folder.name)/"DevToolsActivePort").read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            return [tab for tab in json.load(answer) if tab["type"] == "page"]

    def _wait(self, ask):
        end = time.monotonic() + self.patience
        while True:
            try:
                if answer := ask(): return answer
            except (OSError, IndexError):
                pass
            if time.monotonic() > end: raise TimeoutError("the browser did not come to it")
            time.sleep(.2)

    def call(self, method, **params):
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (m := json.loads(self.ws.recv())).get("id") != self.n:
            self.events.append(m)
        return m["result"]

    def js(self, code):
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        return answer["result"].get("value")

    def open(self, url): self.call("Page.navigate", url=url)
    def until(self, code): return self._wait(lambda: self.js(code))

    def screenshot(self, path):
        shot = self.call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def told(self, method): return [e["params"] for e in self.events if e.get("method") == method]
    def requests(self): return [told["request"]["url"] for told in self.told("Network.requestWillBeSent")]

    def errors(self):
        entries = [told for told in self.told("Log.entryAdded") if told["entry"]["level"] == "error"]
        return [*self.told("Runtime.exceptionThrown"), *entries]
