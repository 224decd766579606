"""What a machine without a GPU can prove about GPU code.

It compiles for sm_80, sm_90 and sm_100, nothing spills, memory moves by 128 bits, and element
offsets have 64 bits.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from zsu_fast.ops import library  # noqa: E402
from zsu_fast.ops.triton import (  # noqa: E402
    ascent_step,
    common,
    masked_cross_entropy,
    scale_rows,
    signed_cross_entropy,
)

ARCHITECTURES = [80, 90, 100]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


# ---- Triton --------------------------------------------------------------------------------------
def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int) -> Any:
    """Compile a kernel for 16-byte aligned pointers and integers without known divisors."""
    names = kernel.arg_names
    warps = constants.pop("num_warps", 4)
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def stack_bytes(kernel: Any) -> int:
    """Returns the local memory per thread: 0 means that nothing spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def vector_moves(kernel: Any) -> tuple[int, int]:
    """Counts the 128-bit loads and stores in the PTX."""
    ptx = kernel.asm["ptx"]
    return tuple(len(re.findall(rf"{op}\.global\S*\.v4\.b32", ptx)) for op in ("ld", "st"))


def offsets_are_64_bit(kernel: Any) -> bool:
    """Whether row times stride is computed in 64 bits, not in 32 and widened later."""
    ttir = kernel.asm["ttir"]
    wide = re.search(r"arith\.muli .*(: i64|xi64>)", ttir)
    row = re.search(r"arith\.extsi %\S+ : i32 to i64", ttir)
    return bool(wide and row)


def alignment(classes: int, size: int) -> int:
    align = 16 // size
    while classes % align:
        align //= 2
    return align


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("classes", [10, 1000, 32768])
@pytest.mark.parametrize(("dtype", "size"), [("*fp32", 4), ("*bf16", 2)])
def test_triton_cross_entropies(arch: int, classes: int, dtype: str, size: int) -> None:
    align = alignment(classes, size)
    loop = classes > common.ONE_PASS_LIMIT
    signed = compiled(
        signed_cross_entropy.signed_cross_entropy_kernel,
        {"logits_ptr": dtype, "logits_stride": "i32", "dlogits_ptr": dtype, "dlogits_stride": "i32",
         "target_ptr": "*i64", "coef_ptr": "*fp32", "row_loss_ptr": "*fp32", "rows": "i32"},
        {"CLASSES": classes, "LOOP": loop, "ALIGN_IN": align, "ALIGN_OUT": align,
         "ACC": tl.float32, **common.row_tile(classes)},
        arch,
    )  # fmt: skip
    masked = compiled(
        masked_cross_entropy.masked_cross_entropy_kernel,
        {"logits_ptr": dtype, "logits_stride": "i32", "teacher_ptr": dtype, "teacher_stride": "i32",
         "forget_ptr": "*u8", "dlogits_ptr": dtype, "coef_ptr": "*fp32", "row_loss_ptr": "*fp32",
         "rows": "i32"},
        {"CLASSES": classes, "LOOP": loop, "ALIGN_X": align, "ALIGN_Z": align, "ACC": tl.float32,
         **common.row_tile(classes)},
        arch,
    )  # fmt: skip
    for kernel in (signed, masked):
        assert stack_bytes(kernel) == 0
        assert offsets_are_64_bit(kernel)
        if classes >= 1000:  # 1000 = 8 x 125: Triton alone does not see that it is a multiple of 8
            loads, stores = vector_moves(kernel)
            assert loads > 0
            assert stores > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("per_channel", [False, True], ids=["one bound", "per channel"])
def test_triton_ascent_step(arch: int, per_channel: bool) -> None:
    pointers = dict.fromkeys(
        ["x_ptr", "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "low_ptr", "high_ptr", "lr_ptr",
         "beta_ptr"], "*fp32",
    )  # fmt: skip
    types = {
        **pointers, "step_ptr": "*i32", "active_ptr": "*u8",
        **dict.fromkeys(["blocks_per_row", "row_size", "lr_stride", "channels", "plane"], "i32"),
        **dict.fromkeys(
            ["beta1", "beta2", "gain1", "gain2", "log_beta1", "log_beta2", "eps"], "fp32"
        ),
    }  # fmt: skip
    kernel = compiled(
        ascent_step.ascent_step_kernel,
        types,
        {"BOUNDS": 3 if per_channel else 1, "CHANNELS_LAST": per_channel, "ALIGN": 4,
         "BLOCK": 1024},
        arch,
    )  # fmt: skip
    assert stack_bytes(kernel) == 0
    assert offsets_are_64_bit(kernel)
    per_array = 1024 // (4 * 32 * 4)  # BLOCK over warps x threads x floats a load
    assert vector_moves(kernel) == tuple(n * per_array for n in (4, 3))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_small_kernels(arch: int) -> None:
    for kernel in (
        compiled(
            common.sum_rows_kernel,
            {"row_loss_ptr": "*fp32", "coef_ptr": "*fp32", "losses_ptr": "*fp32", "rows": "i32"},
            {"SPLIT": True, "BLOCK": 1024}, arch,
        ),
        compiled(
            scale_rows.scale_rows_kernel,
            {"rows_ptr": "*fp32", "row_stride": "i32", "coef_ptr": "*fp32", "grad_ptr": "*fp32",
             "last": "i32", "classes": "i32"},
            {"ACC": tl.float32, "BLOCK": 1024}, arch,
        ),
    ):  # fmt: skip
        assert stack_bytes(kernel) == 0


# ---- CUDA C++: the code in the library -----------------------------------------------------------
ROW_CONFIGS = [(4, 64, 8), (32, 8, 8), (64, 1, 16), (512, 1, 16)]  # csrc/cuda/common.cuh
TYPES = ("f", "d", "6__half", "13__nv_bfloat16")
KERNELS = [
    *(f"register_{op}_cross_entropy_kernelINS0_9RowConfigILi{threads}ELi{rows}ELi{values}EEE{t}"
      for op in ("signed", "masked") for threads, rows, values in ROW_CONFIGS for t in TYPES
      if t != "d" or threads == 64),
    *(f"streaming_{op}_cross_entropy_kernelILi256E{t}"
      for op in ("signed", "masked") for t in TYPES),
    *(f"scale_rows_kernelI{t}" for t in TYPES),
    "ascent_step_kernel",
]  # fmt: skip


@cache
def disassembly(arch: int) -> dict[str, str]:
    """Maps function names to SASS."""
    text = dump("-sass", arch)
    return {part.split(maxsplit=1)[0]: part for part in re.split(r"Function\s*:\s*", text)[1:]}


def dump(option: str, arch: int) -> str:
    if not library.CUDA.path:
        pytest.skip(f"no CUDA library to disassemble: {library.CUDA.reason}")
    if torch.cuda.is_available() and f"{arch // 10}.{arch % 10}" not in architectures_wanted():
        pytest.skip(f"built for this machine's GPU only, not for sm_{arch}")
    run = subprocess.run(
        [CUOBJDUMP, option, "-arch", f"sm_{arch}", str(library.CUDA.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout


def architectures_wanted() -> str:
    """Returns TORCH_CUDA_ARCH_LIST, or the architecture of this machine's GPU."""
    own = ".".join(map(str, torch.cuda.get_device_capability()))
    return os.environ.get("TORCH_CUDA_ARCH_LIST", own)


def only(functions: dict[str, str], kernel: str) -> str:
    (body,) = (text for name, text in functions.items() if kernel in name)
    return body


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_kernels_exist_and_do_not_spill(arch: int) -> None:
    usage = dump("-res-usage", arch)
    stacks = dict(re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage))
    for kernel in KERNELS:
        (stack,) = (int(v) for name, v in stacks.items() if kernel in name)
        assert stack == 0, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_kernels_move_128_bits(arch: int, kernel: str) -> None:
    body = only(disassembly(arch), kernel)
    loads, stores = (len(re.findall(rf"{op}\.E\.128", body)) for op in ("LDG", "STG"))
    assert loads >= (4 if "ascent" in kernel else 2 if "masked" in kernel else 1)
    assert stores >= (3 if "ascent" in kernel else 1)


def test_cuda_sources_have_no_32_bit_element_offsets() -> None:
    """Rows, sizes and strides are int64; `int` is for threads, lanes and positions within a row."""
    root = Path(__file__).parents[2] / "csrc" / "cuda"
    if not root.exists():
        pytest.skip("no sources next to the tests")
    allowed = {"by", "k", "w", "thread", "threads_per_row", "threads", "size"}
    # of RegisterRow: within one row that fits in registers
    allowed |= {"i", "s", "packs_per_thread", "first", "index", "count", "classes", "capacity",
                "misaligned", "row_lanes", "lanes", "streaming_threads"}  # fmt: skip
    allowed |= {"row_threads", "block_rows", "thread_values"}  # of RowConfig
    for source in [*root.glob("*.cu"), *root.glob("*.cuh")]:
        code = re.sub(r"//.*", "", source.read_text())
        declared = set(re.findall(r"\b(?:int|unsigned|uint32_t)\s+(\w+)", code))
        assert declared - allowed - {"w"} == set(), source.name
        # a block or thread index is widened before it enters an offset
        for line in code.splitlines():
            if "blockIdx.x *" in line:
                pytest.fail(f"{source.name}: {line.strip()}")
