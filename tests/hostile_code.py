"""Python code that no sandbox may let through, and what shows that none of it got through."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from trl_toolgrpo.tools.python_sandbox.sandbox import _USERS, Sandbox, SandboxReport


SECRET = "open-sesame-71"
_EXTRA_SECONDS = 2.0


def snippets():
    """Every snippet by name, with the places for what is the machine's; see `hostile_code.yaml`."""
    found = {}
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    for idea, entry in yaml.safe_load(text).items():
        choices = [{"code": code} for code in entry] if isinstance(entry, list) else entry["with"]
        for index, choice in enumerate(choices):
            code = "{code}" if isinstance(entry, list) else entry["code"]
            for name, value in choice.items():
                code = code.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
            found[f"{idea}-{index}"] = code
    return found


class Machine:
    """What hostile code is after: a secret in the environment and in a home, a server, a process, a folder."""

    def __init__(self, folder: Path):
        self.home, self.outside = folder / "home", folder / "outside"
        for path in (self.home, self.outside):
            path.mkdir(mode=0o700)
        self.secret = self.home / ".secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        (self.outside / "kept").write_text("kept")
        self.visits = 0
        self.mark = f"mark-{os.getpid()}-{folder.name}"

    def __enter__(self):
        os.environ["TRL_TOOLGRPO_SECRET"] = SECRET
        self.witness = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        self.server = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0trl-toolgrpo-{self.server.getsockname()[1]}")
        self.unix.listen()
        for server in (self.server, self.unix):
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        self.priority = os.getpriority(os.PRIO_PROCESS, 0)
        return self

    def __exit__(self, *error):
        for server in (self.server, self.unix):
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        self.witness.kill()
        self.witness.wait()
        os.environ.pop("TRL_TOOLGRPO_SECRET", None)

    def _serve(self, server):
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()
                self.visits += 1

    def attack(self, sandbox: Sandbox, code: str) -> tuple[SandboxReport, float]:
        """Runs a snippet; returns what came of it and how long it took."""
        here = {
            "port": self.server.getsockname()[1],
            "pid": os.getpid(),
            "secret": self.secret,
            "home": self.home,
            "outside": self.outside,
        }
        for name, value in here.items():
            code = code.replace(f"{{{name}}}", str(value))
        if self.mark not in sandbox._script:
            sandbox._script = f"# {self.mark}\n{sandbox._script}"
        started = time.monotonic()
        report = sandbox.run(code)
        return report, time.monotonic() - started

    def damage(self, sandbox: Sandbox, report: SandboxReport, seconds: float) -> list[str]:
        """What a snippet did that it must not do."""
        limits = sandbox.limits
        facts = {
            f"{seconds:.1f} s, {_EXTRA_SECONDS} s over the limit": seconds < limits.seconds + _EXTRA_SECONDS,
            f"the sandbox itself failed: {report.output}": report.status != "lost",
            "the secret came out": SECRET not in report.output,
            "the report is forged": "forged" not in report.output,
            f"{len(report.output)} characters of output": len(report.output) <= limits.output,
            "somebody called the server": self.visits == 0,
            "the witness is dead": self.witness.poll() is None,
            "the secret is gone": self.secret.read_text() == SECRET,
            "something was written outside": [path.name for path in self.outside.iterdir()] == ["kept"],
            "the priority of the run changed": os.getpriority(os.PRIO_PROCESS, 0) == self.priority,
            "a process is left": not _left(self.mark),
        }
        return [fault for fault, holds in facts.items() if not holds]


def sandboxes(mark: str, run: int) -> list[int]:
    """Processes that have a mark as an argument, or one of the user ids that a run gives to code."""
    found = []
    first, count = _USERS
    users = range(first + run * 4096 % count, first + run * 4096 % count + 4096)
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_uid in users or mark.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return [process for process in found if process != run]


def _left(mark: str, patience: float = 2.0) -> list[int]:
    """Processes that a sandbox has left, given a moment to be gone."""
    deadline = time.monotonic() + patience
    while (found := sandboxes(mark, os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found
