# ruff: noqa: E501 (programs on one line)
"""Ordinary programs print in the sandbox what plain Python prints; and random ones are survived."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_env.tools.sandbox import ExecResult, Level, Limits, SandboxUnavailable, Status, open_sandbox
from opd_env.tools.sandbox.interpreter import Tier, tier_of


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    try:
        with open_sandbox(request.param, slots=1) as sandbox:
            yield sandbox
    except SandboxUnavailable as error:
        pytest.skip(error.reason)


ORDINARY = {
    "arithmetic": "print(2 ** 100, 7 // 2, -7 % 3, 0.1 + 0.2, divmod(17, 5), round(2.5))",
    "fractions": "from fractions import Fraction\nprint(sum(Fraction(1, n) for n in range(1, 11)))",
    "decimal": "from decimal import *\ngetcontext().prec = 40\nprint(Decimal(2).sqrt())",
    "math": "import math\nprint(math.comb(50, 6), math.factorial(30), math.gcd(84, 36), math.isqrt(10 ** 20))",
    "statistics": "import statistics as s\nprint(s.mean([1, 2, 4]), s.stdev([1, 2, 4]), s.median([3, 1, 2]))",
    "seeded random": "import random\nrandom.seed(3)\nprint(random.random(), random.sample(range(100), 5))",
    "itertools": "from itertools import *\nprint(list(permutations('abc', 2)), list(accumulate([1, 2, 3])))",
    "collections": "from collections import *\nprint(Counter('mississippi').most_common(2), deque([1, 2], 1))",
    "strings": "print('naïve – 数学'.upper(), f'{3.14159:>10.2f}|{1234567:,}', 'a,b'.split(','))",
    "bytes": "print('é'.encode(), bytes(range(5)), b'abc'.hex())",
    "regular expressions": "import re\nprint(re.findall(r'(\\w+)@(\\w+)', 'a@b c@d'), re.sub('x', 'y', 'xx'))",
    "json": "import json\nprint(json.dumps({'b': [1, None, True], 'a': 1.5}, sort_keys=True, indent=1))",
    "dates": "from datetime import *\nprint(date(2024, 2, 28) + timedelta(days=2), datetime(2020, 1, 1).isoformat())",
    "zones": "from zoneinfo import ZoneInfo\nfrom datetime import *\n"
    "print(datetime(2024, 7, 1, tzinfo=ZoneInfo('Europe/Paris')).utcoffset())",
    "calendar": "import calendar\nprint(calendar.month(2024, 2))",
    "classes": "class A:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'A({self.x})'\nprint([A(1)])",
    "data classes": "from dataclasses import *\n@dataclass(order=True)\nclass P:\n    x: int\n    y: int = 0\nprint(P(1) < P(2), P(3))",
    "enums": "from enum import *\nclass C(Enum):\n    A = auto()\n    B = auto()\nprint(list(C), C['A'])",
    "generators": "def g():\n    x = yield 1\n    yield x\ni = g()\nprint(next(i), i.send(5))",
    "recursion": "from functools import cache\n@cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(200))",
    "exceptions": "try:\n    {}['a']\nexcept KeyError as e:\n    print(repr(e))\nfinally:\n    print('end')",
    "context managers": "from contextlib import *\n@contextmanager\ndef c():\n    print('in')\n    yield 1\n    print('out')\nwith c() as x:\n    print(x)",
    "heap and bisect": "import heapq, bisect\nprint(heapq.nsmallest(2, [3, 1, 2]), bisect.bisect([1, 3], 2))",
    "sorting": "print(sorted({'b': 1, 'a': 2}.items(), key=lambda kv: -kv[1]), {3, 1, 2}, sorted('hello', reverse=True))",
    "matrix": "m = [[1, 2], [3, 4]]\nprint([[sum(a * b for a, b in zip(r, c)) for c in zip(*m)] for r in m])",
    "sieve": "n = 1000\ns = [1] * n\nfor i in range(2, n):\n    for j in range(i * i, n, i): s[j] = 0\nprint(sum(s[2:]))",
    "complex": "import cmath\nprint(cmath.sqrt(-1), (1 + 2j) * (3 - 1j), abs(3 + 4j))",
    "csv": "import csv, io\nprint(list(csv.DictReader(io.StringIO('a,b\\n1,2\\n'))))",
    "hashes": "import hashlib, zlib, base64\nprint(hashlib.md5(b'a').hexdigest(), zlib.crc32(b'a'), base64.b64encode(b'abc'))",
    "threads": "import threading\nr = []\nt = [threading.Thread(target=r.append, args=(i,)) for i in range(5)]\n"
    "[x.start() for x in t]; [x.join() for x in t]\nprint(sorted(r))",
    "thread pool": "from concurrent.futures import *\nwith ThreadPoolExecutor(3) as p:\n    print(list(p.map(abs, [-1, -2])))",
    "asyncio": "import asyncio\nasync def f(x):\n    await asyncio.sleep(0.001)\n    return x\n"
    "async def main(): print(await asyncio.gather(f(1), f(2)))\nasyncio.run(main())",
    "database": "import sqlite3\nc = sqlite3.connect(':memory:')\nc.execute('create table t(x)')\n"
    "c.execute('insert into t values (7)')\nprint(c.execute('select x * 6 from t').fetchall())",
    "pickle": "import pickle\nprint(pickle.loads(pickle.dumps({'a': (1, 2)})))",
    "typing": "from typing import *\nclass T(NamedTuple):\n    x: int\nprint(T(1), Optional[int], get_type_hints(T))",
    "match": "def f(p):\n    match p:\n        case {'x': x}: return x\n        case [a, *b]: return b\n        case _: return None\n"
    "print(f({'x': 1}), f([1, 2]), f(0))",
    "exit code": "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)",
    "late code": "import atexit\natexit.register(print, 'late')\nprint('early')",
    "main": "if __name__ == '__main__':\n    print(__name__)",
}


@pytest.fixture(scope="module")
def plain():
    """What plain Python prints, for all programs at once."""
    environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC", "PATH": "/usr/bin:/bin"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-S", "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        for name, code in ORDINARY.items()
    }
    return {name: (process.communicate()[0].decode(), process.returncode) for name, process in started.items()}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_program_prints_what_plain_python_prints(sandbox, plain, name):
    result = sandbox.run(ORDINARY[name])
    assert (result.output, result.exit_code) == plain[name]


def test_files_in_the_working_folder(sandbox):
    if sandbox.level is not Level.NAMESPACES:
        with pytest.raises(ValueError, match="namespaces"):
            sandbox.run("1", files={"a": b""})
        return
    code = """
import helper, os, pathlib, shutil, sqlite3, tempfile
print(helper.x, open('data.csv').read(), sorted(os.listdir('.')))
shutil.copy2('data.csv', 'copy.csv')
os.makedirs('a/b')
pathlib.Path('a/b/c.txt').write_text('c')
with tempfile.NamedTemporaryFile('w+') as file:
    file.write('t')
db = sqlite3.connect('a.db')
db.execute('create table t(x)')
db.commit()
shutil.rmtree('a')
print(sorted(os.listdir('.')))
"""
    result = sandbox.run(code, files={"helper.py": b"x = 5", "data.csv": b"1,2"})
    assert result.status is Status.OK, result.output
    assert "5 1,2 ['data.csv', 'helper.py']\n" in result.output
    assert sandbox.run("import os; print(os.listdir('.'))").output == "[]\n"


@pytest.mark.parametrize(
    ("code", "tier"),
    [
        ("print(1)", Tier.STDLIB),
        ("import numpy as np", Tier.NUMPY),
        ("from sympy import symbols", Tier.SYMPY),
        ("import mpmath, numpy", Tier.SYMPY),
        ("x = 'numpyish'", Tier.STDLIB),
    ],
)
def test_the_tier_is_the_smallest_that_has_what_is_named(code, tier):
    assert tier_of(code) is tier


@pytest.mark.parametrize(
    ("package", "code", "output"),
    [
        ("numpy", "import numpy as np\nprint(np.linalg.inv(np.eye(2)), np.arange(3).sum())", "[[1. 0.]\n [0. 1.]] 3\n"),
        (
            "sympy",
            "from sympy import *\nx = symbols('x')\nprint(integrate(x ** 2, x), solve(x ** 2 - 4))",
            "x**3/3 [-2, 2]\n",
        ),
    ],
)
def test_packages_of_the_tiers_work_and_are_seeded(sandbox, package, code, output):
    pytest.importorskip(package)
    assert sandbox.run(code, limits=Limits(wall_s=100)).output == output
    draw = "import numpy, random\nprint(numpy.random.rand(), random.random())"
    assert sandbox.run(draw).output == sandbox.run(draw).output != sandbox.run(draw, seed=1).output


def test_other_installed_packages_are_not_there(sandbox):
    assert "ModuleNotFoundError" in sandbox.run("import pytest").output


def test_every_slot_draws_the_same_random_numbers(sandbox):
    """A fork seeds ``random`` anew, unless it is seeded after it."""
    first = sandbox.run("import random; print(random.random())").output
    assert first == "0.8444218515250481\n"
    with sandbox.session() as session, sandbox.session() as other:  # two slots at a time
        assert session.run("import random; print(random.random())").output == first
        assert other.run("import random; print(random.random())").output == first


def test_cpu_time_is_over_even_if_its_signal_is_ignored(sandbox):
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert sandbox.run(code, limits=Limits(wall_s=100, cpu_s=1)).status is Status.CPU_LIMIT


def test_the_same_program_prints_the_same(sandbox):
    code = "import random, os\nprint(random.random(), hash('a'), object(), {'b', 'a', 'c'}, os.getpid() > 0, print)"
    assert sandbox.run(code).output == sandbox.run(code).output


# Pieces that hostile and clumsy programs are made of; the fuzzer puts them together.
PIECES = """
x = 1
x = [x] * 1000
x = [x, x]
del x
import os
import sys
import ctypes
import threading
import gc; gc.collect()
os.close(1)
os.close(2)
os.close(0)
os.dup2(1, 0)
os.write(3, b'RDPK' * 10)
os.write(1, os.urandom(64))
os.kill(os.getpid(), 15)
os.abort()
os._exit(7)
os.fork()
os.execv('/bin/sh', ['sh'])
os.chdir('/')
os.setsid()
os.umask(0)
os.mkdir('d')
os.chmod('.', 0)
open('f', 'w').write('x' * 100000)
os.symlink('/', 'l')
os.rename('d', 'e')
sys.exit('bye')
sys.stdout.close()
sys.stdout = None
sys.stderr = None
sys.modules.clear()
sys.setrecursionlimit(5)
sys.settrace(lambda *a: 1/0)
__builtins__.__dict__.clear()
print('y' * 70000)
print('\\0\\x1b[2J\\ud7ff')
raise KeyboardInterrupt
raise SystemExit
raise GeneratorExit
1/0
threading.Thread(target=print, args=('t',)).start()
threading.Thread(target=sys.exit).start()
ctypes.memset(id(None), 0, 8)
ctypes.string_at(8)
signal = __import__('signal'); signal.alarm(1)
__import__('resource').setrlimit(0, (0, 0))
__import__('faulthandler')._sigsegv()
__import__('socket').socketpair()[0].send(b'x')
__import__('mmap').mmap(-1, 1 << 20)
bytearray(1 << 29)
()[0
""".strip().split("\n")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), guarded=st.booleans(), in_session=st.booleans())
def test_random_programs_are_survived(sandbox, pieces, guarded, in_session):
    if guarded:  # go on after what is refused
        code = "\n".join(f"try:\n    {piece}\nexcept BaseException as e:\n    print(type(e))" for piece in pieces)
    else:
        code = "\n".join(pieces)
    limits = Limits(wall_s=1.0)
    if in_session:
        with sandbox.session(limits=limits) as session:
            result = session.run(code)
            if session.alive:
                assert isinstance(session.run("1 + 1"), ExecResult)
    else:
        result = sandbox.run(code, limits=limits)
    assert result.status is not Status.SANDBOX_ERROR
    assert len(result.output) <= 70_000
    assert sandbox.run("print(6 * 7)").output == "42\n"
