"""Freed memory is kept where a command asks for it, and only there."""

import subprocess
import sys

import pytest

TOUCH = """
import resource, sys
import numpy as np
from samlora.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(2**24)  # 128 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

possible = keep_freed_memory(False)
default = faults()
keep_freed_memory()
faults()
kept = faults()
keep_freed_memory(False)
print(possible, default, kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of other systems has no such switch")
def test_what_is_freed_serves_the_next_that_is_asked_for():
    possible, default, kept, again = subprocess.check_output([sys.executable, "-c", TOUCH], text=True).split()
    if possible == "False":
        pytest.skip("this Linux has another C library than glibc")
    assert int(kept) < 0.05 * int(default) and int(again) > 0.5 * int(default)


def test_importing_leaves_the_process_as_it_is():
    code = (
        "import samlora.allocator as a; a.keep_freed_memory = lambda *_: print('touched')\n"
        "import samlora, samlora.cli, samlora.training.loop, samlora.inference.predictor; print('done')"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "done\n"


@pytest.mark.parametrize("program", ["samlora.cli", "samlora.compare.job"])
def test_a_program_asks_for_it(program, tmp_path):
    code = (
        "import samlora.allocator as a; a.keep_freed_memory = lambda *_: print('asked')\n"
        f"import sys, {program} as program; sys.argv[1:] = ['--none']; sys.exit(program.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "asked\n"
