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

import sass  # noqa: E402
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
         "teacher_rows": "i32", "index_ptr": "*i64", "forget_ptr": "*u8", "dlogits_ptr": dtype,
         "coef_ptr": "*fp32", "keep_ptr": "*fp32", "row_loss_ptr": "*fp32", "rows": "i32",
         "shift": "fp32"},
        {"CLASSES": classes, "INDEXED": True, "KEEP": True, "FORGET_ONLY": False, "LOOP": loop,
         "ALIGN_X": align, "ALIGN_Z": align, "ACC": tl.float32, **common.row_tile(classes)},
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
            {"row_loss_ptr": "*fp32", "coef_ptr": "*fp32", "sums_ptr": "*fp32", "rows": "i32"},
            {"SPLIT": True, "BLOCK": common.SUM_BLOCK}, arch,
        ),
        compiled(
            scale_rows.scale_rows_kernel,
            {"rows_ptr": "*fp32", "row_stride": "i32", "coef_ptr": "*fp32", "grad_ptr": "*fp32",
             "last": "i32", "rows": "i32", "classes": "i32"},
            {"ACC": tl.float32, "BLOCK": 1024}, arch,
        ),
    ):  # fmt: skip
        assert stack_bytes(kernel) == 0


# ---- CUDA C++: the code in the library -----------------------------------------------------------
TYPES = ("f", "d", "6__half", "13__nv_bfloat16")
# of logits and teacher; a repeated type is a back reference in the symbol
MASKED_TYPES = [("f", "f"), ("d", "d"), *((t, z) for t in TYPES[2:] for z in (r"S\d?_", "f"))]
# rows that are whole packs (b1) or not (b0): csrc/cuda/rows.cuh
SIGNED = [
    (c, w) for c in ("4ELi64ELi8", "32ELi8ELi8", "64ELi1ELi16", "512ELi1ELi16") for w in (0, 1)
]
MASKED = [(c, w) for c in ("4ELi64ELi8", "32ELi8ELi8", "1024ELi1ELi8") for w in (0, 1)]
MASKED += [("128ELi1ELi8", 0), ("64ELi1ELi16", 1)]
IN_DOUBLE = ("64ELi1ELi16", "128ELi1ELi8")  # the only shapes in double
KERNELS = [
    *(f"register_signed_cross_entropy_kernelINS0_9RowConfigILi{config}EEE{t}Lb{whole}E"
      for config, whole in SIGNED for t in TYPES if t != "d" or config in IN_DOUBLE),
    *(f"register_masked_cross_entropy_kernelINS0_9RowConfigILi{config}EEE{t}{z}Lb{whole}E"
      for config, whole in MASKED for t, z in MASKED_TYPES if t != "d" or config in IN_DOUBLE),
    *(f"streaming_signed_cross_entropy_kernelI{t}E" for t in TYPES),
    *(f"streaming_masked_cross_entropy_kernelI{t}{z}E" for t, z in MASKED_TYPES),
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
    (body,) = (text for name, text in functions.items() if re.search(kernel, name))
    return body


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_kernels_exist_and_do_not_spill(arch: int) -> None:
    usage = dump("-res-usage", arch)
    stacks = dict(re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage))
    for kernel in KERNELS:
        (stack,) = (int(v) for name, v in stacks.items() if re.search(kernel, name))
        assert stack == 0, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_kernels_move_128_bits(arch: int, kernel: str) -> None:
    body = only(disassembly(arch), kernel)
    loads, stores = (len(re.findall(rf"{op}\.E\.128", body)) for op in ("LDG", "STG"))
    assert loads >= (4 if "ascent" in kernel else 2 if "masked" in kernel else 1)
    assert stores >= (3 if "ascent" in kernel else 1)


# what most threads do per row of 1,000 classes (16 each), and at most: registers, instructions
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("op", "types", "packs", "registers", "most"),
    [
        ("signed", "13__nv_bfloat16", 2, 48, 320),
        ("signed", "6__half", 2, 48, 330),
        ("signed", "f", 4, 48, 640),
        ("masked", r"13__nv_bfloat16S\d?_", 2, 64, 600),
        ("masked", "ff", 4, 64, 1000),
    ],
)
def test_cuda_rows_wait_for_memory_once(
    arch: int, op: str, types: str, packs: int, registers: int, most: int
) -> None:
    kernel = rf"register_{op}_cross_entropy_kernelINS0_9RowConfigILi64ELi1ELi16EEE{types}Lb1E"
    inputs = 2 if op == "masked" else 1
    work = {"LDG.E.128": inputs * packs, "STG.E.128": packs, "MUFU.EX2": 16 * inputs, "BAR": 3}
    path = sass.shortest_path(only(disassembly(arch), kernel), work)
    # the mask that a block reads once, for all its rows, is written by other threads
    assert sass.memory_waits(path) == 1
    assert len(path) <= most
    usage = re.findall(r"Function (\S+):\s+REG:(\d+)", dump("-res-usage", arch))
    (used,) = (int(count) for name, count in usage if re.search(kernel, name))
    assert used <= registers


def test_memory_waits_are_counted() -> None:
    """Two loads that are waited for together count once, and one after the other twice."""

    def code(*lines: tuple[str, int, int]) -> str:  # text, scoreboards to wait for, to set
        return "\n".join(
            f"/*{16 * i:04x}*/ {text} ; /* 0x{0:016x} */\n /* 0x{wait << 52 | to_set << 46:016x} */"
            for i, (text, wait, to_set) in enumerate(lines)
        )

    end = ("EXIT", 0, 7)
    together = [("LDG.E R0, [R2]", 0, 0), ("LDG.E R1, [R4]", 0, 1), ("FADD R0, R0, R1", 3, 7), end]
    apart = [("LDG.E R0, [R2]", 0, 0), ("LDG.E R1, [R0]", 1, 1), ("FADD R0, R0, R1", 2, 7), end]
    for lines, waits in ((together, 1), (apart, 2)):
        path = sass.shortest_path(code(*lines), {"LDG": 2})
        assert len(path) == 4
        assert sass.memory_waits(path) == waits
    around = [("@P0 BRA 0x20", 0, 7), ("LDG.E R0, [R2]", 0, 0), ("FADD R0, R0, R1", 1, 7), end]
    assert len(sass.shortest_path(code(*around), {})) == 3
    assert len(sass.shortest_path(code(*around), {"LDG": 1})) == 4


def test_cuda_sources_have_no_32_bit_element_offsets() -> None:
    """Rows, sizes and strides are int64; `int` is for threads, lanes and positions within a row."""
    root = Path(__file__).parents[2] / "csrc" / "cuda"
    if not root.exists():
        pytest.skip("no sources next to the tests")
    allowed = {"by", "k", "w", "r", "s", "i", "n", "thread", "threads", "threads_per_row", "size"}
    # within one row: rows are shorter than 2^31
    allowed |= {"first", "index", "classes", "capacity", "misaligned", "leading", "end", "target",
                "checked_target"}  # fmt: skip
    allowed |= {"packs", "words", "warps", "span", "turn", "lanes", "row_lanes", "place", "kind",
                "rows_per_block", "threads_per_block", "row_threads", "block_rows",
                "thread_values", "registers", "pack_size", "blocks_per_processor",
                "streaming_threads", "device", "processors", "per_processor", "bits", "retained",
                "forgotten", "mask", "mask_bits"}  # fmt: skip
    for source in [*root.glob("*.cu"), *root.glob("*.cuh")]:
        code = re.sub(r"//.*", "", source.read_text())
        declared = set(re.findall(r"\b(?:int|unsigned|uint32_t)\s+(\w+)", code))
        assert declared - allowed == set(), source.name
        # a block or thread index is widened before it enters an offset
        for line in code.splitlines():
            if "blockIdx.x *" in line:
                pytest.fail(f"{source.name}: {line.strip()}")
