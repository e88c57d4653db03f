"""A headless Chromium by its debugging protocol: what a test of a page needs, over one websocket."""
import base64, json, shutil, subprocess, tempfile, time, urllib.request
from pathlib import Path

import pytest

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync --hide-scrollbars --remote-debugging-port=0").split()

class Browser:
    "Open, ask, wait, look; skips the test where there is no Chromium."
    def __init__(self, size=(1100, 1400), patience=300):
        websocket = pytest.importorskip("websocket", reason="websocket-client is not installed (pip install '.[dev]')")
        exe = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if exe is None:
            pytest.skip("no Chromium on this machine")
        self.patience, self.n, self.events, self.folder = patience, 0, [], tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        args = [exe, *FLAGS, f"--user-data-dir={self.folder.name}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        self.process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = self._wait(lambda: (Path(self.folder.name)/"DevToolsActivePort").read_text().split()[0])
            tabs = self._wait(lambda: [t for t in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")) if t["type"] == "page"])
            self.ws = websocket.create_connection(tabs[0]["webSocketDebuggerUrl"], timeout=patience, suppress_origin=True)
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
    def js(self, code): return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")
    def open(self, url): self.call("Page.navigate", url=url)
    def until(self, code): return self._wait(lambda: self.js(code))
    def screenshot(self, path): Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
    def requests(self): return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
    def errors(self):
        return [e["params"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"
                or e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]
