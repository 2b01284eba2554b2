"""`keep_freed_memory`: whether a tensor gets fresh pages, by the page faults of the process."""

import platform
import subprocess
import sys
import textwrap

import pytest
from conftest import chat_tokenizer, config, prompts, tiny_model

from trl_toolgrpo import ToolGRPOTrainer


KEPT = """
    import resource, sys
    import torch
    from trl_toolgrpo.models.allocator import keep_freed_memory

    if sys.argv[1] == "keep":
        assert keep_freed_memory()
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    before = faults()
    for size in range(20, 25):
        torch.ones(2**size)
    print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_smaller_tensors_get_the_memory_of_a_larger_one_that_is_gone():
    faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", textwrap.dedent(KEPT), mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < 1000 < 10_000 < faults["return"]


@pytest.mark.parametrize("keep", [True, False])
def test_the_option_says_whether_it_is_done(tmp_path, monkeypatch, keep):
    calls = []
    monkeypatch.setattr("trl_toolgrpo.trainer.keep_freed_memory", lambda: calls.append(True))
    tokenizer = chat_tokenizer()
    args = config(tmp_path, keep_freed_memory=keep)
    ToolGRPOTrainer(tiny_model(tokenizer), lambda completions, **_: [0.0] * len(completions), args, prompts(),
                    processing_class=tokenizer)  # fmt: skip
    assert calls == [True] * keep
