"""Python processes that start at once: a warm one, in which the heavy libraries are imported, forks for each of them.

As a script it is that warm process. Fresh processes cost seconds of imports each; forks of a process that never did
anything else start from the same state in milliseconds.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

RUN = subprocess.run  # the real one: what is not a verification still goes there
LIBRARIES = """
import torch, transformers, diffusers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()
transformers.LlamaForCausalLM, transformers.ViTForImageClassification, transformers.BertModel
diffusers.DiTPipeline
"""
HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("compress", "compress_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
try:
    import compress
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("compress is not hidden")
"""
COMPRESS = "import compress.pipeline, compress.validate, compress.data, models\n"


@dataclass
class Child:
    """A forked process and where its output goes."""

    pid: int
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()


class Warm:
    """The parent's end: starts the warm process and orders forks."""

    def __init__(self, folder: Path, preload: str, **environment: str):
        self.folder, self.count = folder, 0
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
        hides = HIDDEN in preload
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
        environment["PYTHONPATH"] = "" if hides else os.pathsep.join(paths)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, preload],
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code: str, *arguments) -> Child:
        self.count += 1
        log = self.folder / f"child-{self.count}.log"
        log.touch()
        return Child(self.ask(code=code, arguments=[str(word) for word in arguments], log=str(log)), log)

    def wait(self, child: Child) -> int:
        """The exit code; negative after a signal."""
        return self.ask(wait=child.pid)

    def run(self, code: str, *arguments) -> str:
        """What the code printed; it must not fail."""
        child = self.start(code, *arguments)
        assert self.wait(child) == 0, child.said
        return child.said

    def verify(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """In the place of subprocess.run for `python -m compress.verification FOLDER`."""
        if "compress.verification" not in command:
            return RUN(command, **options)
        child = self.start("verification()", Path(command[-1]).resolve())
        code = self.wait(child)
        return subprocess.CompletedProcess(command, code, child.said, child.said)

    def close(self) -> None:
        self.process.communicate()


def verification() -> None:
    runpy.run_module("compress.verification", run_name="__main__")


def forked(command: list[str], **options) -> subprocess.CompletedProcess:
    """In the place of subprocess.run inside a fork."""
    if "compress.verification" not in command:
        return RUN(command, **options)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        work("verification()", command[-1:], writer)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(command, code, said, said)


def work(code: str, arguments: list[str], log: int) -> None:
    """Run the code in this fork and leave."""
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__", "verification": verification})
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Fork for every order; the parent knows the children by their process ids."""
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            os.setsid()  # so that all its own forks can be killed with it
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            subprocess.run = forked
            work(order["code"], order["arguments"], os.open(order["log"], os.O_WRONLY | os.O_APPEND))
        print(child, flush=True)


if __name__ == "__main__":
    exec(sys.argv[1])
    serve()
