"""Runs tests of the checkout it stands in, one request after another, each in a forked child.

Libraries are imported once, the product and the tests anew in every child. A request is a line of JSON: `names` (what
pytest is given), `skip` (tests that ran before), `limit` (seconds of CPU), `base` (for temporary folders); the answer
says what failed or how far it got.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict

import pytest


LIBRARIES = [
    "torch",
    "torch._dynamo",
    "torch.nn.attention.flex_attention",
    "transformers.trainer",
    "transformers.generation.utils",
    "accelerate",
    "datasets",
    "peft",
    "safetensors.torch",
    "hypothesis",
    "scipy.optimize",
    "matplotlib.pyplot",
    "typer",
    "jinja2",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "qwen2")),
]


class Watch:
    """Orders the tests and notes what happens; a pytest plugin.

    One case of every test function runs before the second of any, and slow tests last: a fault in the code of one
    option is then met early.
    """

    def __init__(self, skip: int, notes):
        self.skip, self.notes, self.done = skip, notes, skip

    def note(self, **what):
        print(json.dumps({"done": self.done, "cpu": time.process_time(), **what}), file=self.notes, flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list):
        cases = defaultdict(list)
        for item in items:
            cases[item.nodeid.split("[")[0]].append(item)
        rounds = {}
        for name, members in cases.items():
            random.Random(name).shuffle(members)
            rounds.update({id(item): index for index, item in enumerate(members)})
        items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, rounds[id(item)]))
        del items[: self.skip]

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(by=report.nodeid, why=str(report.longrepr)[-160:])

    def pytest_runtest_logstart(self, nodeid: str):
        self.note(at=nodeid)

    def pytest_runtest_logfinish(self):
        self.done += 1

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.note(by=report.nodeid, why=(crash.message if crash else str(report.longrepr))[:160])


def child(request: dict, notes) -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + request["limit"]),) * 2)
    watch = Watch(request["skip"], notes)
    options = ["-xq", "-n0", "--tb=short", "-pno:cacheprovider", f"--basetemp={request['base']}"]
    code = int(pytest.main([*options, *request["names"]], plugins=[watch]))
    watch.note(code=code)
    return code


def answer(request: dict) -> dict:
    """Run one request in a child with a session of its own, which ends with everything it started."""
    with tempfile.TemporaryFile("w+") as notes:
        pid = os.fork()
        if not pid:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            code = 99
            try:
                code = child(request, notes)
            finally:
                os._exit(code)
        deadline = time.monotonic() + 30 * request["limit"]
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        notes.seek(0)
        lines = [json.loads(line) for line in notes]
    result = {"done": request["skip"], "code": None}
    for line in lines:
        result |= line if "by" not in result else {key: line[key] for key in ("done", "cpu", "code") if key in line}
    return result


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    for library in LIBRARIES:
        importlib.import_module(library)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
